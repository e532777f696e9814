"""plan.html: memory, network and bounds of each stage, to be looked at."""

import math
from typing import Any

from refrag_jax.report import page
from refrag_jax.runtime import files

# What a device's memory holds, in the order of the bar, and its colour.
PARTS = (
  ('parameters', 'parameter_bytes', 'series0'),
  ('optimizer', 'optimizer_bytes', 'series1'),
  ('gradients', 'gradient_bytes', 'series2'),
  ('activations and other temporaries', 'rest', 'series4'),
)
MOST_CELLS = 512  # of a drawn mesh


def write(path: str, plan: dict[str, Any]) -> None:
  """Writes the page of a plan.json."""
  known = plan['hbm_bytes'] > 0
  parts = [
    ('What is planned', planned(plan)),
    ('Memory', memory(plan)),
    ('Time', times(plan) if known else NO_TIME),
    ('Mesh', mesh(plan['mesh'])),
    ('Parameters', arrays(plan)),
    ('Network', network(plan)),
  ]
  if plan['serving']:
    parts.append(('Serving', answering(plan['serving'], plan['hbm_bytes'])))
  if plan['fixes']:
    parts.insert(2, ('What would fit', fixes(plan['fixes'])))
  if plan['search']:
    parts.insert(3, ('Layouts', ranking(plan['search'])))
  title = f'{plan["config"]} on {plan["topology"]}'
  axes = ' × '.join(f'{name} {n}' for name, n in plan['mesh'].items())
  head = (
    f'<h1>{page.text(title)}</h1><p class="muted">{plan["devices"]} devices, '
    f'{axes}. Compiled for them without any; times are lower bounds, not '
    'predictions.</p>'
  )
  body = f'<style>{STYLE}</style>' + head + page.sections(parts)
  files.write_text(path, page.page(title, body))


STYLE = """
.bar { display: flex; height: 1.5rem; background: var(--panel);
  border: 1px solid var(--line); max-width: 46rem; position: relative; }
.bar span { display: block; height: 100%; }
.key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0
  1rem; vertical-align: -.05rem; }
.mesh { display: grid; gap: 2px; width: max-content; max-width: 100%;
  overflow-x: auto; font-size: .7rem; }
.mesh div { width: 2.1rem; height: 1.5rem; text-align: center;
  line-height: 1.5rem; color: #fff; border-radius: 3px; }
.shard { fill: none; stroke: var(--muted); stroke-width: 1; }
.mine { fill: var(--series0); }
"""
NO_TIME = '<p>Nothing is known of the speed of these devices.</p>'


def planned(plan: dict[str, Any]) -> str:
  """Each stage's budget, and the hours that it takes at least."""
  rows, total = [], 0.0
  for name, of in plan['budgets'].items():
    hours = plan['stages'][name]['bound_hours']
    total += hours
    rows.append([
      page.name(name),
      *map(page.number, of.values()),
      page.number(hours, 1),
    ])  # fmt: skip
  head = ('stage', 'steps', 'batch', 's', 'o', 'k', 'hours at least')
  known = plan['hbm_bytes'] > 0
  note = (
    'Batch: sequences of a step over all devices. s: tokens of context that '
    'are read in chunks of k; o: tokens of output that are predicted.'
  )
  if known:
    note = f'All stages take {total:,.1f} hours at least. {note}'
  return page.table(head, rows, note)


def memory(plan: dict[str, Any]) -> str:
  """A bar a stage: what fills the memory of a device."""
  stages, hbm = plan['stages'], plan['hbm_bytes']
  full = max([hbm, *(s['peak_bytes'] for s in stages.values())]) or 1
  key = ''.join(
    f'<span class="key" style="background:var(--{colour})"></span>{label}'
    for label, _, colour in PARTS
  )
  out = [f'<p class="muted">{key}</p>']
  for name, stage in stages.items():
    spans = ''.join(
      f'<span style="width:{100 * size / full:.2f}%;background:var(--{colour})"'
      f' title="{label}: {gib(size)}"></span>'
      for label, colour, size in pieces(stage)
    )
    limit = ''
    if hbm:
      limit = (
        f'<span style="position:absolute;left:{100 * hbm / full:.2f}%;width:2px'
        ';background:var(--ink)" title="the memory there is"></span>'
      )
    verdict = (
      '<span class="good">fits</span>'
      if stage['fits']
      else '<span class="bad">does not fit</span>'
    )
    out.append(
      f'<h3>{page.name(name)} {gib(stage["peak_bytes"])} {verdict}</h3>'
      f'<div class="bar">{spans}{limit}</div>'
    )
  rows = [
    [
      page.name(name),
      *(gib(size) for _, _, size in pieces(stage)),
      gib(stage['peak_bytes']),
      gib(hbm) if hbm else page.MISSING,
      f'{stage["chunks"]} chunks'
      + (f', {page.text(stage["variant"])}' if stage['variant'] else ''),
    ]
    for name, stage in stages.items()
  ]
  head = ('stage', *(p[0] for p in PARTS), 'peak', 'there is', 'compiled')
  return ''.join(out) + page.table(
    head,
    rows,
    'Of one device, at the stage&#x2019;s most expensive step; the last column '
    'says which one that is.',
  )


def pieces(stage: dict[str, Any]) -> list[tuple[str, str, int]]:
  """(label, colour, bytes); together they are the peak."""
  sizes = {key: stage[key] for _, key, _ in PARTS if key != 'rest'}
  sizes['rest'] = max(0, stage['peak_bytes'] - sum(sizes.values()))
  return [(label, colour, sizes[key]) for label, key, colour in PARTS]


def times(plan: dict[str, Any]) -> str:
  rows = [
    [
      page.name(name),
      page.number(stage['flops'] / 1e12, 1),
      page.number(stage['model_flops'] / 1e12, 1),
      *(
        bold(seconds(stage[f'{kind}_s']), stage['bound_by'] == kind)
        for kind in ('compute', 'hbm', 'network')
      ),
      page.number(round(stage['tokens_per_s'])),
      share(stage['mfu_ceiling']),
      page.number(stage['bound_hours'], 1),
      page.number(stage['compile_s'], 1),
    ]
    for name, stage in plan['stages'].items()
  ]
  head = (
    'stage', 'TFLOP', 'without recomputation', 'arithmetic', 'memory',
    'network', 'tokens/s', 'MFU at most', 'hours at least', 'compiled in s',
  )  # fmt: skip
  return page.table(
    head,
    rows,
    'What a step cannot be quicker than; bold is what binds. FLOPs are those '
    'of a device, attention counted dense, of which fused kernels skip up to '
    'half. MFU counts no recomputation, and tokens are those of the text, '
    'compressed or not.',
  )


def mesh(axes: dict[str, int]) -> str:
  """Rows: the outer axis; columns: the others. Colour: the second axis."""
  (outer, rows), *inner = axes.items()
  columns = math.prod(n for _, n in inner)
  if rows * columns > MOST_CELLS:
    return f'<p>{rows} x {columns} devices, too many to draw.</p>'
  middle = inner[0][1]
  size = columns // middle
  hue = lambda d: round(360 * (d % columns // size) / middle)
  cells = ''.join(
    f'<div style="background:hsl({hue(d)} 45% 40%)">{d}</div>'
    for d in range(rows * columns)
  )
  others = ' × '.join(f'{name} {n}' for name, n in inner)
  return page.figure(
    f'<div class="mesh" style="grid-template-columns:repeat({columns},auto)">'
    f'{cells}</div>',
    f'Each row is one of {rows} along {page.text(outer)}; within it '
    f'{page.text(others)}. Devices of one colour hold the same shards of what '
    f'lies over {page.text(inner[0][0])} alone.',
  )


def arrays(plan: dict[str, Any]) -> str:
  """The largest parameters, each cut as its devices hold it."""
  rows = [
    [
      page.name(a['path']),
      '×'.join(map(str, a['shape'])),
      page.name(a['spec']),
      '×'.join(map(str, a['shard'])),
      picture(a['shape'], a['shard']),
      gib(a['bytes']),
      page.number(a['copies']),
    ]
    for a in plan['arrays']
  ]
  head = (
    'parameter', 'shape', 'layout', 'shard', '', 'on a device', 'copies',
  )  # fmt: skip
  return page.table(
    head,
    rows,
    'The largest first; filled is what the first device holds. Copies: how '
    'many devices hold the same shard.',
  )


def picture(shape: list[int], shard: list[int]) -> str:
  """The last two axes that are cut, or the last two."""
  cut = [i for i, (n, m) in enumerate(zip(shape, shard)) if n != m]
  last = [i for i in range(len(shape)) if i not in cut]
  axes = sorted((cut + last[::-1])[:2]) if len(cut) < 2 else cut[-2:]
  counts = [shape[i] // shard[i] for i in axes]
  if len(counts) == 1:
    counts = [1, *counts]
  rows, columns = counts or (1, 1)
  width, height = 72, 32
  lines = ''.join(
    f'<path class="shard" d="M{width * c / columns:.1f} 0V{height}"/>'
    for c in range(1, min(columns, 64))
  ) + ''.join(
    f'<path class="shard" d="M0 {height * r / rows:.1f}H{width}"/>'
    for r in range(1, min(rows, 64))
  )
  return (
    f'<svg width="{width}" height="{height}" role="img" aria-label="{rows} by '
    f'{columns}"><rect class="mine" width="{width / columns:.2f}" '
    f'height="{height / rows:.2f}"/>{lines}<rect class="shard" '
    f'width="{width}" height="{height}"/></svg>'
  )


def network(plan: dict[str, Any]) -> str:
  out = []
  for name, stage in plan['stages'].items():
    rows = [
      [
        page.name(c['op']),
        page.text(c['axis']),
        gib(c['bytes']),
        page.number(c['count']),
        gib(c['bytes'] * c['count']),
      ]
      for c in stage['collectives'][:12]
    ]
    total = sum(c['bytes'] * c['count'] for c in stage['collectives'])
    kinds = len(stage['collectives'])
    note = (
      f'{gib(total)} a step in {kinds} kinds of collective; the largest '
      'twelve. Those inside loops count as often as they run.'
    )
    head = ('collective', 'axis', 'of each', 'times', 'in all')
    if rows:
      table = page.table(head, rows, note)
      out.append(page.details(f'{name}: {gib(total)}', table))
    elif math.isnan(stage['network_s']):
      out.append(f'<p>{page.name(name)}: not known.</p>')
  return ''.join(out) or '<p>Nothing is sent.</p>'


def fixes(by_stage: dict[str, list[dict[str, Any]]]) -> str:
  out = []
  for stage, found in by_stage.items():
    rows = [
      [page.name(f['change']), gib(f['peak_bytes']), seconds(f['bound_step_s'])]
      for f in found
    ]
    out.append(
      page.table(
        ('change', 'peak', 'a step at least'),
        rows,
        f'{page.text(stage)} was compiled with each of these, and fits.',
      )
      or f'<p>No small change was found with which {page.text(stage)} fits.</p>'
    )
  return ''.join(out)


def ranking(rows: list[dict[str, Any]]) -> str:
  return page.table(
    ('layout', 'peak', 'fits', 'a step at least', 'bound by', 'MFU at most'),
    [
      [
        page.name(r['change']),
        gib(r['peak_bytes']),
        'yes' if r['fits'] else '<span class="bad">no</span>',
        seconds(r['bound_step_s']),
        page.text(r['bound_by']),
        share(r['mfu_ceiling']),
      ]
      for r in rows
    ],
    f'The most expensive stage, {page.text(rows[0]["stage"])}, compiled with '
    'each; first those that fit, by their lower bound.',
  )


def bold(text: str, yes: bool) -> str:
  return f'<b>{text}</b>' if yes else text


def share(value: float | None) -> str:
  return page.MISSING if value is None or value != value else f'{value:.0%}'


def seconds(value: float) -> str:
  if value is None or value != value:
    return page.MISSING
  return f'{value * 1e3:.1f} ms' if value < 1 else f'{value:.2f} s'


def gib(size: float) -> str:
  """Bytes for people, in the largest binary unit that leaves a digit."""
  for unit in ('B', 'KiB', 'MiB'):
    if size < 1024:
      return f'{size:.0f} {unit}' if unit == 'B' else f'{size:.1f} {unit}'
    size /= 1024
  return f'{size:.2f} GiB'


def answering(serving: dict[str, Any], hbm: int) -> str:
  """The engine's programs, and how many sequences fit beside its weights."""
  rows = [
    [
      page.text(p['name']),
      page.number(p['positions']),
      page.number(p['flops'] / 1e12, 2),
      gib(p['temp_bytes']),
      page.number(1e3 * p['bound_s'], 2),
      page.text(p['bound_by'] if hbm else page.MISSING),
    ]
    for p in serving['programs']
  ]
  fit = serving['sequences_that_fit']
  note = (
    f'Weights take {gib(serving["weight_bytes"])} of a device, and '
    f'{gib(serving["slot_bytes"])} each sequence of up to '
    f'{serving["positions"]:,} positions that it holds a part of'
    + (f'; {fit:,} fit. ' if fit is not None else '. ')
    + f'A prefill is of one sequence, a decode step of {serving["slots"]:,}. '
    'Times are the least that arithmetic and memory allow.'
  )
  head = (
    'program',
    'positions',
    'TFLOP a device',
    'temporary',
    'least ms',
    'by',
  )
  return page.table(head, rows, note)
