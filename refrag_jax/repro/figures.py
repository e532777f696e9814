"""The figures of repro.html, in the style and colours of a run's report."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from refrag_jax.report.figures import INK, MUTED, SERIES, STYLE, svg

DASHES = ('-', '--', ':', '-.')
MARKERS = 'os^vDX'


class Line(NamedTuple):
  label: str  # '' where another line has said it
  x: Sequence[float]
  y: Sequence[float]
  error: Sequence[float]  # () where there is none
  look: int  # equal looks, equal colours and dashes


class Bar(NamedTuple):
  """An estimate in `forest`: a point, its interval, and each seed's mean."""

  label: str
  mean: float
  low: float
  high: float
  seeds: Sequence[float]
  margin: float | None


def lines(
  name: str,
  title: str,
  xlabel: str,
  ylabel: str,
  drawn: Sequence[Line],
  *,
  log2: bool = False,
  zero: bool = False,
  markers: bool = True,
) -> str:
  """Lines over one axis, with bars of one standard error.

  Args:
    name: unique on the page.
    log2: a logarithmic x axis, its ticks at values that occur.
    zero: draws a line at 0.
    markers: False for curves of many points.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(5.6, 3.8), layout='constrained')
    axes = figure.subplots()
    if zero:
      axes.axhline(0.0, color=MUTED, linewidth=1)
    for line in drawn:
      look = dict(
        color=SERIES[line.look % len(SERIES)],
        linestyle=DASHES[line.look // len(SERIES) % len(DASHES)],
        marker=MARKERS[line.look % len(MARKERS)] if markers else None,
      )
      axes.errorbar(
        line.x, line.y, list(line.error) or None, markersize=4, linewidth=1.3,
        elinewidth=1, label=line.label or None, **look,
      )  # fmt: skip
    if log2:
      ticks = sorted({x for line in drawn for x in line.x})
      if len(ticks) > 8:
        ticks = [x for x in ticks if np.log2(x).is_integer()]
      axes.set_xscale('log', base=2)
      axes.set_xticks(ticks, [f'{x:g}' for x in ticks])
      axes.minorticks_off()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if any(line.label for line in drawn):
      axes.legend(ncols=1 + (len(drawn) > 8))
    return svg(figure, name, f'{title}: {ylabel} by {xlabel}')


def forest(
  name: str, title: str, unit: str, groups: Mapping[str, Sequence[Bar]]
) -> str:
  """Estimates one under the other, each with its interval.

  Args:
    name: unique on the page.
    groups: what the tests say, and their estimates, one a data set.
  """
  height = 0.55 + sum(0.3 + 0.24 * len(bars) for bars in groups.values())
  with matplotlib.rc_context(STYLE | {'axes.grid.axis': 'x'}):
    figure = Figure(figsize=(5.6, height + 0.3), layout='constrained')
    axes = figure.subplots()
    axes.axvline(0.0, color=MUTED, linewidth=1)
    y, ticks, labels = 0.0, [], []
    for group, bars in groups.items():
      axes.annotate(
        group, (0.0, y), xycoords=('axes fraction', 'data'), color=INK,
        va='center', xytext=(2, 0), textcoords='offset points', fontsize=9,
      )  # fmt: skip
      for i, bar in enumerate(bars):
        y -= 0.85
        colour = SERIES[i % len(SERIES)]
        axes.plot([bar.low, bar.high], [y, y], color=colour, linewidth=2)
        axes.plot(
          bar.mean, y, color=colour, markersize=5,
          marker=MARKERS[i % len(MARKERS)],
        )  # fmt: skip
        axes.plot(
          bar.seeds, [y] * len(bar.seeds), color=INK, marker='|',
          linestyle='', markersize=7, markeredgewidth=0.8,
        )  # fmt: skip
        for side in (-1, 1) if bar.margin is not None else ():
          axes.plot(
            side * bar.margin, y, color=MUTED, marker='x', markersize=4
          )  # fmt: skip
        ticks.append(y)
        labels.append(bar.label)
      y -= 1.15
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y + 0.5, 0.7)
    axes.set(title=title, xlabel=unit)
    return svg(figure, name, f'{title}: {unit}')
