"""The tables and pictures of RESULTS.md and repro.html beside the verdicts.

Each function yields blocks (refrag_jax/repro/page.py) of what the records have,
and nothing where they have nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refrag_jax import flops
from refrag_jax.report import figures as report_figures
from refrag_jax.report import page
from refrag_jax.repro import figures, verdicts
from refrag_jax.repro import records as records_lib
from refrag_jax.repro.page import (
  MISSING,
  Heading,
  Picture,
  Table,
  shown_counts,
  shown_stat,
)
from refrag_jax.repro.paper_tables import TABLES, PaperTable
from refrag_jax.repro.questions import filled
from refrag_jax.repro.records import Records, Run
from refrag_jax.runtime import files

NLL = 'mean NLL, nats per token'


# --- Beside the paper ---------------------------------------------------------


def beside(
  spec: Mapping[str, Any], preset: Mapping[str, Any], records: Records
) -> Iterator:
  """The paper's tables with ours at their side, by [[table]] of the claims."""
  for raw in filled(spec.get('table', ()), preset):
    table = TABLES[raw['paper']]
    cells = [cell for _, cell in raw['rows'] if cell]
    names = records_lib.datasets(records, cells)
    rows = [
      (
        *_their_row(table, theirs, raw),
        *_our_row(records, ours, names, raw.get('gap', ())),
      )
      for theirs, ours in raw['rows']
    ]
    head = [table.short(column) for column in raw['columns']]
    head += ['share'] * ('paper_gap' in raw) + ['here']
    head += ['share'] * ('gap' in raw) + [*names, 'n']
    ours = dict.fromkeys(
      f'`{part}`, {column}'
      for _, part, _, column in map(records_lib.split, cells)
    )
    yield Heading(f'{raw["paper"]} ({table.where}): {table.title}')
    yield Table(
      ['paper', *head],
      rows,
      f'{raw["says"]} Columns: {", ".join(raw["columns"])}; here '
      f'{", ".join(ours)}. {_BESIDE}'
      + ' Share: of the gap closed.'
      * ('share' in head),
    )


_BESIDE = (
  'Log-perplexity, lower is better; ± standard error over documents, n: '
  'documents of each data set. The paper counts LLaMA tokens and we our own: '
  'compare the order of rows, not levels.'
)


def _their_row(table: PaperTable, name: str, raw: Mapping) -> list[str]:
  columns, gap = raw['columns'], raw.get('paper_gap', ())
  if not name:
    return [''] * (1 + len(columns) + bool(gap))
  shares = [_paper_share(table, name, columns, gap)] if gap else []
  return [name, *map(page.number, table.row(name, columns)), *shares]


def _our_row(
  records: Records, cell: str, names: Sequence[str], gap: Sequence[str]
) -> list[str]:
  if not cell:
    return [''] * (2 + len(names) + bool(gap))
  stats = [records_lib.measured(records, {cell: 1.0}, name) for name in names]
  arm, _, row, _ = records_lib.split(cell)
  shares = [_our_share(records, cell, gap, names)] if gap else []
  values = [*shares, *map(shown_stat, stats), shown_counts(stats)]
  return [f'`{arm}/{row}`', *values]


def _paper_share(
  table: PaperTable, name: str, columns: Sequence[str], gap: Sequence[str]
) -> str:
  """The share of the gap closed by a row of the paper, at its own s."""
  at = name[name.index(' s=') :] if ' s=' in name else ''
  of = [table.row(row + at, columns) for row in gap if row + at in table.rows]
  if len(of) < 2:
    return page.MISSING
  return _percent(verdicts.gap_closed(of[0], table.row(name, columns), *of[1:]))


def _our_share(
  records: Records, cell: str, gap: Sequence[str], names: Sequence[str]
) -> str:
  """The same for ours, over the data sets that have all of it."""
  cells = list(dict.fromkeys((*gap, cell)))
  means = []
  for name in names:
    of_seed = records_lib.by_seed(records, cells, name)
    if of_seed:
      means.append(records_lib.over_seeds(of_seed)[1].mean(0))
  if not means:
    return MISSING
  of = dict(zip(cells, np.array(means).T, strict=True))
  none, *full = (of[name] for name in gap)
  return _percent(verdicts.gap_closed(none, of[cell], *full))


# --- Beyond the paper ---------------------------------------------------------


def beyond(preset, records: Records) -> Iterator:
  main = first_run(records, 'main')
  if main is None or not preset:
    return
  own = f'main/details/refrag_k{preset["k"]}'
  names = list(main.evals.get('details', {}))
  for title, xlabel, letter, terms in (
    (
      'Gain by output position, over no context trained alike',
      'output position', 'o',
      {'main/details/no_context_trained': 1.0, own: -1.0},
    ),
    (
      'Gain by output position, over another document’s chunks',
      'output position', 'o',
      {f'{own}_shuffled': 1.0, own: -1.0},
    ),
    (
      'Gain by distance of the one expanded chunk from the output',
      'distance, chunks', 'd',
      {'main/details/expand_one_gain': 1.0},
    ),
  ):  # fmt: skip
    drawn = {
      name: _by_place(records, main, name, letter, terms) for name in names
    }
    drawn = {name: values for name, values in drawn.items() if values}
    if not drawn:
      continue
    yield Heading(title)
    yield Picture([
      figures.lines(
        title, title, xlabel, 'nats per token',
        [
          figures.Line(
            name,
            list(values),
            # What is not finite is a gap in the line.
            [
              np.nan if v['mean'] is None else v['mean']
              for v in values.values()
            ],
            [v['se'] or 0.0 for v in values.values()],
            i,
          )
          for i, (name, values) in enumerate(drawn.items())
        ],
        log2=True, zero=True,
      )
    ])  # fmt: skip
    places = [
      place
      for place in sorted({place for v in drawn.values() for place in v})
      if place & (place - 1) == 0
    ]
    yield Table(
      ('data set', *(f'{letter}{place}' for place in places),
       f'mean from {letter}2 on', 'n'),
      [
        (
          name,
          *(shown_stat(values.get(place), 4) for place in places),
          shown_stat(_from_second(records, name, letter, terms, values), 4),
          shown_counts(list(values.values())),
        )
        for name, values in drawn.items()
      ],
      'Nats per token, paired; places that are powers of two.',
    )  # fmt: skip
  yield from _at_one_rate(preset, records)
  yield from _exact(records, main)
  selection = main.results.get('evals', {}).get('selection', {})
  pictures = [
    report_figures.selection_curve(
      f'{name} {tail}',
      f'{name}, tail chunks expanded in every row' if tail else name,
      rows,
      NLL,
    )
    for name, all_rows in selection.items()
    for tail in (False, True)
    if (
      rows := [
        row
        for row in all_rows
        if bool(row.get('tail_expanded')) == tail
        and (row.get('nll') or {}).get('mean') is not None
      ]
    )
  ]
  if pictures:
    yield Heading('Selection by rate')
    yield Picture(
      pictures, f'As the paper’s Figure 3; `{main.name}` alone.'
    )  # fmt: skip


def _by_place(records, main, dataset, letter, terms) -> dict[int, dict]:
  """place: STAT of the terms at this column, for all places that have it."""
  rows = main.evals['details'][dataset]['rows']
  first = next(iter(terms)).split('/')[2]
  places = sorted(
    int(column[1:])
    for column in rows.get(first, {})
    if column[0] == letter and column[1:].isdigit()
  )
  found = {
    place: records_lib.measured(
      records, {f'{c}/{letter}{place}': w for c, w in terms.items()}, dataset
    )
    for place in places
  }
  return {
    place: stat for place, stat in found.items() if stat and stat['n']
  }  # fmt: skip


def _from_second(records, dataset, letter, terms, places) -> dict | None:
  """STAT of the mean over all places but the first."""
  rest = [place for place in places if place > 1]
  weights = {
    f'{cell}/{letter}{place}': weight / len(rest)
    for cell, weight in terms.items()
    for place in rest
  }
  return records_lib.measured(records, weights, dataset) if weights else None


def _at_one_rate(preset, records: Records) -> Iterator:
  """Claim 7 with what else has as many positions, or fewer."""
  fine, chosen = (
    f'{preset[name]}/{preset["all"]}' for name in ('compressed', 'selective')
  )
  arm, part, _, column = records_lib.split(chosen)
  rows = {
    'the policy expands': chosen,
    'the rule `last` expands': chosen.replace('_rl_', '_last_'),
    'random chunks expanded': chosen.replace('_rl_', '_random_'),
    'last tokens alone, trained alike': f'{arm}/{part}/last_k_trained/{column}',
  }
  names = records_lib.datasets(records, [fine])
  shown = []
  for what, cell in rows.items():
    stats = [
      records_lib.measured(records, {cell: 1.0, fine: -1.0}, name)
      for name in names
    ]
    if any(stats):
      stats = [shown_stat(stat, 4) for stat in stats]
      shown.append((what, f'`{cell}`', *stats))
  if shown:
    yield Heading('At the same rate')
    yield Table(
      ('what', 'row', *names),
      shown,
      f'Less `{fine}`, which expands nothing: nats per token, paired; below '
      'zero is better than it.',
      prose=(0,),
    )


def _exact(records: Records, main: Run) -> Iterator:
  """Shares of numbers and identifiers that come back exactly."""
  rows = []
  kinds = ('compressed', 'expanded', 'shuffled')
  for part, of_dataset in main.evals.items():
    if not part.startswith('details_'):
      continue
    what = part.removeprefix('details_')
    for dataset in of_dataset:
      stats = [
        records_lib.measured(
          records, {f'main/{part}/{what}_{kind}/exact': 1.0}, dataset
        )
        for kind in kinds
      ]
      kind, _, length = what.partition('_P')
      rows.append((
        f'{kind} in {length} tokens', dataset, *map(shown_stat, stats),
        shown_counts(stats),
      ))  # fmt: skip
  if rows:
    yield Heading('Exact reconstruction of numbers and identifiers')
    yield Table(
      ('what', 'data set', *kinds, 'n'),
      sorted(rows),
      'Share regenerated without a fault, from its chunk embeddings, from its '
      'own tokens, and from another document’s embeddings.',
    )


# --- Costs --------------------------------------------------------------------


def costs(preset, records: Records) -> Iterator:
  """What has to be computed before the first output token (claim 9)."""
  main = first_run(records, 'main')
  saved = main.config if main else {}
  model, window = saved.get('model'), saved.get('stage', {}).get('cpt')
  if not (model and window and preset):
    return
  k, s = preset['k'], window['context_length']
  decoder, encoder, policy = (
    model[part] for part in ('decoder', 'encoder', 'policy')
  )
  L = s // k
  special = 2  # CLS and SEP
  plain = lambda positions: flops.decoder_flops(decoder, positions)
  chunks = lambda size: (
    flops.encoder_flops(encoder, s // size, size + special)
    + flops.projection_flops(encoder, decoder, s // size)
  )
  rows = [
    ('no context', 1, plain(1), 0),
    (f'the last {L} tokens', 1 + L, plain(1 + L), 0),
    *(
      (f'REFRAG, k = {size}', 1 + s // size, plain(1 + s // size), chunks(size))
      for size in sorted({k // 2, k, 2 * k, 4 * k} - {0})
      if s % size == 0
    ),
  ]
  draws = int(float(preset['p']) * L)
  positions = 1 + L - draws + draws * k
  rows.append((
    f'REFRAG, k = {k}, {draws} of {L} chunks expanded by the policy',
    positions, plain(positions),
    chunks(k) + flops.policy_flops(policy, encoder, L),
  ))  # fmt: skip
  rows.append((
    f'REPLUG, {k} pieces of {L} tokens', k * (1 + L), k * plain(1 + L), 0
  ))  # fmt: skip
  piece = model.get('piece_length')
  if piece:
    states = s // piece * (piece + special)
    rows.append((
      f'CEPE, pieces of {piece} tokens', 1,
      plain(1) + flops.cross_attention_flops(encoder, decoder, 1, states),
      flops.encoder_flops(encoder, s // piece, piece + special),
    ))  # fmt: skip
  rows.append((f'full context, {s} tokens', 1 + s, plain(1 + s), 0))
  yield Table(
    ('reads the context as', 'decoder positions', 'decoder MFLOP',
     'encoder MFLOP', 'together'),
    [
      (name, page.number(positions), _mega(own), _mega(beside),
       _mega(own + beside))
      for name, positions, own, beside in rows
    ],
    f'By the sizes of `{main.name}`, s = {s}, counted with BOS: the forward '
    'passes before the first output, dense attention, a product of (a, b) and '
    '(b, c) as 2abc. Chunk vectors can be kept and then cost the encoder '
    'nothing; CEPE’s states as well, at one vector a token. An encoder token '
    'for each decoder token, and two special ones a chunk or piece.',
  )  # fmt: skip


# --- Curves and all rows ------------------------------------------------------


def curves(records: Records) -> Iterator:
  """Held-out loss of every stage, in every run that trained it."""
  points = {}  # stage -> arm -> one curve a seed: step -> value
  runs = sorted(records.runs.values(), key=lambda run: run.arm != 'main')
  for run in runs:
    own = {}
    for line in files.read_lines(os.path.join(run.directory, 'metrics.jsonl')):
      value = line.get('loss', line.get('reward'))
      if line.get('split') == 'heldout' and value is not None:
        own.setdefault(str(line.get('stage')), {})[line['step']] = value
    for stage, curve in own.items():
      points.setdefault(stage, {}).setdefault(run.arm, []).append(curve)
  pictures = []
  for stage, of_arm in points.items():
    drawn = [
      figures.Line(
        '' if seed else arm, list(curve), list(curve.values()), (), i
      )
      for i, (arm, curves_of) in enumerate(of_arm.items())
      for seed, curve in enumerate(curves_of)
    ]
    pictures.append(
      figures.lines(
        f'curve {stage}', stage, 'step', 'held out', drawn, markers=False
      )
    )
  yield Picture(
    pictures, 'One line a seed: mean NLL (`grpo`: reward) held out.'
  )
  rows = [
    (
      f'`{stage}`', f'`{run.name}`', page.number(record.get('steps')),
      shown_stat(record.get('heldout_before')),
      shown_stat(record.get('heldout_after')),
      shown_stat(record.get('paired_gain'), 4),
      shown_counts([record.get('paired_gain')]),
    )
    for run in runs
    for stage, record in run.results.get('stages', {}).items()
  ]  # fmt: skip
  order = {row[0]: i for i, row in reversed(list(enumerate(rows)))}
  yield Table(
    ('stage', 'run', 'steps', 'before', 'after', 'gain', 'n'),
    sorted(rows, key=lambda row: order[row[0]]),
    'What to expect of a stage: mean NLL (`grpo`: reward) on its one fixed '
    'held-out batch, ± standard error over documents.' if rows else '',
  )  # fmt: skip


def every_row(records: Records) -> Iterator:
  """Each cell that was measured, pooled over seeds, folded by eval."""
  arms = dict.fromkeys(arm for _, arm in records.runs)
  parts = dict.fromkeys(
    part
    for run in records.runs.values()
    for part in run.evals
    if not part.startswith('details')
  )
  for part in parts:
    rows, names = [], {}
    for arm in arms:
      own = [r.evals[part] for r in runs_of(records, arm) if part in r.evals]
      names |= dict.fromkeys(name for tables in own for name in tables)
      cells = dict.fromkeys(
        (row, column)
        for tables in own
        for table in tables.values()
        for row, columns in table['rows'].items()
        for column in columns
      )
      rows += [(arm, row, column) for row, column in cells]
    shown = []
    for arm, row, column in rows:
      cell = f'{arm}/{part}/{row}/{column}'
      stats = [records_lib.measured(records, {cell: 1.0}, n) for n in names]
      if any(stats):
        shown.append((
          f'`{arm}/{row}`', column, *map(shown_stat, stats), shown_counts(stats)
        ))  # fmt: skip
    yield Table(
      ('row', 'column', *names, 'n'),
      shown,
      'Mean ± standard error over documents, pooled over seeds.',
      folded=f'{part}: {len(shown)} rows',
    )


# --- Helpers ------------------------------------------------------------------


def first_run(records: Records, arm: str) -> Run | None:
  """The run of an arm with the lowest seed."""
  return next(iter(runs_of(records, arm)), None)


def runs_of(records: Records, arm: str) -> list[Run]:
  return [run for (_, name), run in sorted(records.runs.items()) if name == arm]


def _percent(value: float) -> str:
  return page.number(100 * value, 1) + ' %' if np.isfinite(value) else MISSING


def _mega(value: float) -> str:
  return page.number(value / 1e6, 2)
