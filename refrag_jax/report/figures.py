"""The figures of a report, as SVG that takes its colours from the page.

Matplotlib draws with stand-in colours; in the SVG they are exchanged for the
page's CSS variables, so that one picture is right on white and on black.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

INK, MUTED, LINE, PAGE = '#0a0b01', '#0a0b02', '#0a0b03', '#0a0b04'
SERIES = ('#0a0b10', '#0a0b11', '#0a0b12', '#0a0b13', '#0a0b14', '#0a0b15')
VARIABLES = {INK: 'ink', MUTED: 'muted', LINE: 'line', PAGE: 'page'} | {
  colour: f'series{i}' for i, colour in enumerate(SERIES)
}
STYLE = {
  'svg.fonttype': 'none',  # real text: searchable, in the page's font
  'svg.hashsalt': 'refrag_jax',  # the same numbers, the same file
  'font.family': 'sans-serif',
  'font.size': 10,
  'text.color': INK,
  'axes.edgecolor': LINE,
  'axes.facecolor': 'none',
  'axes.labelcolor': MUTED,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.titlesize': 11,
  'axes.titlelocation': 'left',
  'axes.titlecolor': INK,
  'figure.facecolor': 'none',
  'grid.color': LINE,
  'grid.linewidth': 0.6,
  'xtick.color': LINE,
  'xtick.labelcolor': MUTED,
  'ytick.color': LINE,
  'ytick.labelcolor': MUTED,
  'legend.frameon': False,
  'legend.fontsize': 9,
}

# One look a selector, the same in every figure: colour, marker, line.
SELECTORS = {
  'rl': (SERIES[0], 'o', '-'),
  'last': (SERIES[1], 's', '-'),
  'ppl_desc': (SERIES[2], '^', '-'),
  'ppl_asc': (SERIES[3], 'v', '--'),
  'oracle': (SERIES[4], 'D', ':'),
  'random': (SERIES[5], 'x', '--'),
}


def loss_curve(
  title: str,
  quantity: str,
  train: tuple[Sequence[float], Sequence[float]],
  heldout: tuple[Sequence[float], Sequence[float]],
) -> str:
  """One stage: every logged value, their running mean, held-out points.

  Args:
    title: the stage.
    quantity: 'loss' or 'reward'.
    train: steps and values.
    heldout: steps and values.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.0, 2.7), layout='constrained')
    axes = figure.subplots()
    steps, values = train
    if len(steps):
      axes.plot(steps, values, color=SERIES[0], alpha=0.35, linewidth=0.8)
      axes.plot(
        steps, running_mean(values), color=SERIES[0], label='train'
      )  # fmt: skip
    if len(heldout[0]):
      axes.plot(
        *heldout, color=SERIES[1], marker='o', markersize=4, linewidth=1,
        linestyle='--', label='held out',
      )  # fmt: skip
    axes.set(title=title, xlabel='step', ylabel=quantity)
    axes.legend()
    return svg(figure, f'curve-{title}', f'{quantity} of {title} by step')


def selection_curve(
  name: str, title: str, rows: Sequence[Mapping[str, Any]], unit: str
) -> str:
  """Log-perplexity by effective compression rate (the paper's Figure 3).

  Args:
    name: unique on the page.
    title: what stands above it.
    rows: of `selection` in results.json. Rows with p = 0 expand nothing: one
      point, whatever their selector is called, at which every line begins.
    unit: of the vertical axis.
  """
  start = [row for row in rows if not row['p']][:1]
  named = list(dict.fromkeys(r['selector'] for r in rows if r['p']))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(5.6, 4.0), layout='constrained')
    axes = figure.subplots()
    for i, selector in enumerate(named):
      own = [r for r in rows if r['selector'] == selector and r['p']]
      own = sorted(start + own, key=lambda r: r['rate'])
      colour, marker, dashes = SELECTORS.get(
        selector, (SERIES[i % len(SERIES)], '*', '-.')
      )  # fmt: skip
      line, _, bars = axes.errorbar(
        [r['rate'] for r in own],
        [r['nll']['mean'] for r in own],
        [(r['nll'].get('se') or 0.0) if r['p'] else 0.0 for r in own],
        color=colour, marker=marker, linestyle=dashes, label=selector,
        markersize=5, linewidth=1.4, elinewidth=1,
        markevery=slice(0, len(own) - len(start)),
      )  # fmt: skip
      # All stand at the same rates: side by side, or bars would hide bars.
      aside = ScaledTranslation(
        (i - (len(named) - 1) / 2) * 2.2 / 72, 0, figure.dpi_scale_trans
      )
      for artist in (line, *bars):
        artist.set_transform(axes.transData + aside)
    for row in start:
      axes.errorbar(
        row['rate'], row['nll']['mean'], row['nll'].get('se') or 0.0,
        marker='o', markersize=9, color=INK, markerfacecolor=PAGE, zorder=3,
      )  # fmt: skip
      axes.annotate(
        'p = 0', (row['rate'], row['nll']['mean']), xytext=(-10, 10),
        textcoords='offset points', ha='right', color=INK,
      )  # fmt: skip
    axes.set(
      title=title, ylabel=unit,
      xlabel='effective compression rate k / (1 − p + kp)',
    )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    axes.legend([h[0] for h in handles], labels, ncols=2, loc='lower right')
    return svg(figure, name, f'{name}: {unit} by compression rate')


def running_mean(values: Sequence[float], window: int = 0) -> np.ndarray:
  """Mean over a window round each point (N,), shorter at the ends."""
  values = np.asarray(values, np.float64)
  half = (window or max(1, len(values) // 20)) // 2
  total = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low = np.maximum(index - half, 0)
  high = np.minimum(index + half + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def svg(figure: Figure, prefix: str, label: str) -> str:
  """A figure as inline SVG: page colours, ids of its own, a spoken label."""
  buffer = io.StringIO()
  figure.savefig(buffer, format='svg')
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  for colour, variable in VARIABLES.items():
    text = text.replace(colour, f'var(--{variable})')
  # Two figures on one page must not share ids: clip paths and markers.
  prefix = re.sub(r'\W+', '-', prefix)
  text = re.sub(r'\bid="', f'id="{prefix}-', text)
  text = re.sub(r'(href="|url\()#', rf'\g<1>#{prefix}-', text)
  label = re.sub(r'[<>&"]', ' ', label)
  return text.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)
