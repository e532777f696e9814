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
  parts += [
    (
      f'{batch} at once',
      page_lib.figure(
        figure([row for row in rows if row['batch'] == batch], batch),
        'Times as many as with full context, by the length of the context. '
        'Above 1 is faster.',
      ),
    )
    for batch in dict.fromkeys(row['batch'] for row in rows)
  ]
  return page_lib.page('Latency', page_lib.sections(parts))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line a cell."""
  head = [
    'read as', 'context', 'at once', 'positions', 'padded', 'TTFT, ms', 'p50',
    'p99', 'roofline', 'encode, ms', 'policy', 'project', 'prefill', 'TPOT, ms',
    'roofline', 'tokens/s', 'speed-up', 'FLOP limit', 'of the limit',
  ]  # fmt: skip
  number = page_lib.number
  body = [
    [
      page_lib.text(label(row)),
      number(row['context']),
      number(row['batch']),
      number(row['decoder_positions']),
      number(row['padded_positions']),
      page_lib.measured(
        {
          'mean': row['mean_ttft_ms'],
          'se': row.get('se_ttft_ms'),
          'n': row['requests'],
        },
        1,
      ),
      number(row['p50_ttft_ms'], 1),
      number(row['p99_ttft_ms'], 1),
      number(row.get('roofline_ms'), 1),
      *(
        number(row['split_ms'].get(step), 1)
        for step in ('encode', 'policy', 'project', 'prefill')
      ),
      number(row['mean_tpot_ms'], 2),
      number(row.get('tpot_roofline_ms'), 2),
      number(row['output_throughput'], 1),
      number(row.get('speedup'), 2),
      number(row.get('flop_limit'), 2),
      number(row.get('fraction_of_limit'), 2),
    ]
    for row in rows
  ]
  note = (
    'TTFT: from the chunks of the passages, or their embeddings, in hand to '
    'the first token; TPOT: each token after it. A speed-up is over full '
    'context with as many requests; its FLOP limit counts what both multiply. '
    'More than the limit is owed to a slow baseline. A roofline is the time '
    'that FLOPs or bytes take at the least. Encode, policy, project and '
    'prefill are the parts of TTFT, in ms; the last is what the others leave.'
  )
  return page_lib.table(head, body, note)


def saturated(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line a cell that had as many requests at once as the device holds."""
  head = [
    'read as', 'context', 'positions', 'at once', 'requests/s',
    'of full context', 'tokens/s', 'TPOT, ms', 'roofline',
  ]  # fmt: skip
  number = page_lib.number
  body = [
    [
      page_lib.text(label(row)),
      number(row['context']),
      number(row['decoder_positions']),
      number(row['batch']),
      number(row['request_throughput'], 2),
      number(row.get('throughput_ratio'), 2),
      number(row['output_throughput'], 1),
      number(row['mean_tpot_ms'], 2),
      number(row.get('tpot_roofline_ms'), 2),
    ]
    for row in rows
  ]
  note = (
    'Each slot is taken twice. Chunk embeddings are in hand; prompts are '
    'prefilled one by one between the steps of the others.'
  )
  return page_lib.table(head, body, note)


def figure(rows: Sequence[Mapping[str, Any]], batch: int) -> str:
  """Three panels of speed-ups over full context, as the paper's Figure 2."""
  series: dict[str, dict[int, Mapping]] = {}
  for row in rows:
    series.setdefault(label(row), {})[row['context']] = row
  full = series.pop(label({'arm': 'full_context'}))
  with matplotlib.rc_context(STYLE):
    drawn = Figure(figsize=(9, 3.2), layout='constrained')
    panels = drawn.subplots(1, len(PANELS))
    for axes, (column, more, title) in zip(panels, PANELS, strict=True):
      for i, (name, of) in enumerate(series.items()):
        contexts = sorted(of.keys() & full.keys())
        ratios = [
          of[c][column] / full[c][column]
          if more
          else full[c][column] / of[c][column]
          for c in contexts
        ]
        axes.plot(
          contexts, ratios, marker='osD^vx'[i % 6], markersize=4,
          color=SERIES[i % len(SERIES)], label=name,
          linestyle="-" if "in hand" in name else "--",
        )  # fmt: skip
      axes.axhline(1, color=MUTED, linewidth=0.8)
      axes.set(title=title, xscale='log', xlabel='tokens of context')
      axes.set_xticks(sorted(full), [f'{c:,}' for c in sorted(full)])
      axes.minorticks_off()
    panels[0].set_ylabel('times as fast')
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc='outside lower center', ncols=3)
    return svg(drawn, f'bench{batch}', f'speed-ups, {batch} requests at once')
