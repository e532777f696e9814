"""bench.html: the table of a bench, and its speed-ups in the paper's form."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from refrag_jax.report import page as page_lib
from refrag_jax.report.figures import MUTED, SERIES, STYLE, svg
from refrag_jax.serve.bench import label

# Panels of the paper's Figure 2: column, whether more is better, its heading.
PANELS = (
  ('mean_ttft_ms', False, 'time to first token'),
  ('mean_tpot_ms', False, 'time per token after it'),
  ('output_throughput', True, 'tokens per second'),
)


def ttft(row: Mapping[str, Any]) -> dict[str, Any]:
  """The STAT of the time to the first token, in ms."""
  return {
    'mean': row['mean_ttft_ms'],
    'se': row.get('se_ttft_ms'),
    'n': row['requests'],
  }


# Heading; key of a row, or a function of it; digits.
NAME = ('read as', label, 0)
CONTEXT, POSITIONS, AT_ONCE = (
  ('context', 'context', 0),
  ('positions', 'decoder_positions', 0),
  ('at once', 'batch', 0),
)
STEP = (('TPOT, ms', 'mean_tpot_ms', 2), ('roofline', 'tpot_roofline_ms', 2))
TOKENS = ('tokens/s', 'output_throughput', 1)
COLUMNS = (
  NAME, CONTEXT, AT_ONCE, POSITIONS,
  ('padded', 'padded_positions', 0),
  ('TTFT, ms', ttft, 1),
  ('p50', 'p50_ttft_ms', 1),
  ('p99', 'p99_ttft_ms', 1),
  ('roofline', 'roofline_ms', 1),
  ('encode, ms', 'split_ms.encode', 1),
  ('policy', 'split_ms.policy', 1),
  ('project', 'split_ms.project', 1),
  ('prefill', 'split_ms.prefill', 1),
  *STEP, TOKENS,
  ('speed-up', 'speedup', 2),
  ('FLOP limit', 'flop_limit', 2),
  ('of the limit', 'fraction_of_limit', 2),
)  # fmt: skip
SATURATED = (
  NAME, CONTEXT, POSITIONS, AT_ONCE,
  ('requests/s', 'request_throughput', 2),
  ('of full context', 'throughput_ratio', 2),
  TOKENS, *STEP,
)  # fmt: skip


def page(bench: Mapping[str, Any]) -> str:
  """The whole page."""
  rows = [row for row in bench['rows'] if not row['saturated']]
  full = [row for row in bench['rows'] if row['saturated']]
  about = (
    f'{bench["devices"]} x {bench["device"]}, {bench["cpus"]} CPUs, '
    f'{bench["dtype"]}, jax {bench["versions"].get("jax", "?")}; parameters '
    f'{bench["parameters"]}. Compiled in {bench["compile_s"]:.0f} s before; '
    f'{bench["compiles_after_warmup"]} programs compiled after.'
  )
  parts = [
    ('Times', f'<p>{page_lib.text(about)}</p>{table(rows) if rows else ""}')
  ]
  if full:
    parts.append(('As many as fit', saturated(full)))
  for batch in dict.fromkeys(row['batch'] for row in rows):
    of_batch = [row for row in rows if row['batch'] == batch]
    parts.append(
      (
        f'{batch} at once',
        page_lib.figure(
          by_context(of_batch),
          'Times as many as with full context, by the length of the context. '
          'Above 1 is faster.',
        )
        + by_fraction(of_batch),
      )
    )
  return page_lib.page('Latency', page_lib.sections(parts))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line a cell."""
  note = (
    'TTFT: from the chunks of the passages, or their embeddings, in hand to '
    'the first token; TPOT: each token after it. A speed-up is over full '
    'context with as many requests; its FLOP limit counts what both multiply. '
    'More than the limit is owed to a slow baseline. A roofline is the time '
    'that FLOPs or bytes take at the least. Encode, policy, project and '
    'prefill are the parts of TTFT, in ms; the last is what the others leave.'
  )
  return _table(rows, COLUMNS, note)


def saturated(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line a cell that had as many requests at once as the device holds."""
  note = (
    'Each slot is taken twice. Chunk embeddings are in hand; prompts are '
    'prefilled one by one between the steps of the others.'
  )
  return _table(rows, SATURATED, note)


def _table(rows, columns: Sequence[tuple[str, Any, int]], note: str) -> str:
  def cell(row, what, digits: int) -> str:
    if isinstance(what, str):  # a key, or one of its parts
      key, _, part = what.partition('.')
      value = row.get(key, {}).get(part) if part else row.get(key)
      return page_lib.number(value, digits)
    value = what(row)
    if isinstance(value, str):
      return page_lib.text(value)
    return page_lib.measured(value, digits)

  body = [
    [cell(row, what, digits) for _, what, digits in columns] for row in rows
  ]
  return page_lib.table([head for head, *_ in columns], body, note)


def by_context(rows: Sequence[Mapping[str, Any]]) -> str:
  """Three panels of speed-ups over full context, as the paper's Figure 2.

  REFRAG with as little expanded as there is.
  """
  least = min(row['p'] for row in rows if row['arm'] == 'refrag')
  full, series = {}, {}
  for row in rows:
    if row['arm'] == 'full_context':  # measured beside each k
      full[row['context'], row['k']] = row
    elif row['arm'] != 'last_k' and row['p'] in (0.0, least):
      series.setdefault(label(row), {})[row['context']] = row
  contexts = sorted({context for context, _ in full})
  with matplotlib.rc_context(STYLE):
    drawn = Figure(figsize=(9, 3.4), layout='constrained')
    panels = drawn.subplots(1, len(PANELS))
    for axes, (column, more, title) in zip(panels, PANELS, strict=True):
      for i, (name, of) in enumerate(series.items()):
        ratios = [
          (of[c][column] / full[c, of[c]['k']][column]) ** (1 if more else -1)
          for c in sorted(of)
        ]
        other = next(iter(of.values()))['arm'] != 'refrag'
        _line(axes, i, sorted(of), ratios, name, MUTED if other else '')
      axes.set(title=title, xscale='log', xlabel='tokens of context')
      axes.set_xticks(contexts, [f'{c:,}' for c in contexts])
      axes.minorticks_off()
    _finish(drawn, panels[0])
    return svg(drawn, f'bench{rows[0]["batch"]}', 'speed-ups by context')


def by_fraction(rows: Sequence[Mapping[str, Any]]) -> str:
  """What expanding costs at the longest context; '' for a single share."""
  longest = max(row['context'] for row in rows)
  series: dict[tuple[int, bool], dict[float, float]] = {}
  for row in rows:
    if row['arm'] == 'refrag' and row['context'] == longest:
      of = series.setdefault((row['k'], row['cached']), {})
      of[row['p']] = row['speedup']
  if max(map(len, series.values())) < 2:
    return ''
  with matplotlib.rc_context(STYLE):
    drawn = Figure(figsize=(5, 3.4), layout='constrained')
    axes = drawn.subplots()
    for i, ((k, cached), of) in enumerate(series.items()):
      name = f'k = {k}, {"in hand" if cached else "encoded"}'
      _line(axes, i, sorted(of), [of[p] for p in sorted(of)], name)
    axes.set(title='time to first token', xlabel='share of chunks as tokens')
    _finish(drawn, axes)
    name = f'bench{rows[0]["batch"]}p'
    return page_lib.figure(
      svg(drawn, name, 'speed-ups by the share of chunks that stay tokens'),
      f'What expanding costs, at {longest:,} tokens of context.',
    )


def _line(axes, i: int, x, y, name: str, colour: str = '') -> None:
  axes.plot(
    x, y, marker='osD^vxP*'[i % 8], markersize=4,
    color=colour or SERIES[i % len(SERIES)],
    label=name, linestyle='-' if 'in hand' in name else '--',
  )  # fmt: skip


def _finish(drawn: Figure, first) -> None:
  for axes in drawn.axes:
    axes.axhline(1, color=MUTED, linewidth=0.8)
  first.set_ylabel('times as fast')
  handles, labels = first.get_legend_handles_labels()
  drawn.legend(handles, labels, loc='outside lower center', ncols=2)
