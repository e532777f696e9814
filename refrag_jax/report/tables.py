"""The tables of a report: stages, comparisons, selection, questions.

A STAT is `{"mean", "se", "n"}`; a difference is row minus other, paired.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from refrag_jax import results
from refrag_jax.report import page

Stat = Mapping[str, Any]

NLL = 'mean NLL, nats per token'
MARKS = (
  f'{page.GOOD} better, {page.BAD} worse than the other row by more than three '
  'standard errors; unmarked differences are within three. Differences are row '
  'minus other, paired on the same documents; standard errors and n are over '
  'documents.'
)
# Without reading its context a model can beat `no_context`, by having had more
# training on such text; it cannot beat these two.
CONTROLS = {
  r'no_context_trained': 'no_context_trained',
  r'.*shuffled': 'shuffled',
}
OUTPUTS = 'the mean over that many first tokens of the output'
# Higher is better only for these.
SCORES = (
  'em', 'f1', 'accuracy', 'rouge1', 'rouge2', 'rougeL',
  'share', 'same_place', 'hit', 'exact',
)  # fmt: skip


def stage_table(stages: Mapping[str, Any]) -> str:
  head = (
    'stage', 'steps', 'held out before', 'after', 'paired gain', 'n', 'wall',
    'compile', 'tokens/s', 'trained', 'frozen', 'unchanged',
  )  # fmt: skip
  rows = []
  for stage, value in stages.items():
    gain = value.get('paired_gain')
    reward = value.get('measures') == 'reward'
    rows.append((
      page.name(stage) + ' <span class="se">reward</span>' * reward,
      page.number(value.get('steps')),
      page.measured(value.get('heldout_before')),
      page.measured(value.get('heldout_after')),
      difference(gain, higher_is_better=True),
      _count([gain]),
      _seconds(value.get('wall_s')),
      _seconds(value.get('compile_s')),
      _whole(value.get('tokens_per_s')),
      _whole(value.get('trainable_params')),
      _whole(value.get('frozen_params')),
      _unchanged(value),
    ))  # fmt: skip
  note = (
    'On one fixed held-out batch a stage: mean NLL in nats per token, or mean '
    'reward, before and after it. A positive gain is an improvement, of the '
    f'loss as of the reward; {page.GOOD} {page.BAD}: above three standard '
    'errors. Trained and frozen: parameters; unchanged: the frozen ones, '
    'compared bit by bit.'
  )
  cut = [
    f'{stage} {value["encoder_cut"]:,} of {value["chunks"]:,}'
    for stage, value in stages.items()
    if value.get('encoder_cut')
  ]
  if cut:
    note += (
      ' Held-out chunks of which the encoder reads the beginning only '
      f'(data.max_encoder_tokens): {", ".join(cut)}.'
    )
  return page.table(head, rows, note)


def comparison(datasets: Mapping[str, Any], columns: str = OUTPUTS) -> str:
  """Each row's NLL, then its differences from the two controls.

  Args:
    columns: what P and a number stands for.
  """
  parts = []
  for dataset, value in datasets.items():
    rows = list(rows_of(value))
    parts += [
      f'<h3>{page.text(dataset)}</h3>',
      _notes(value),
      _levels(rows, columns),
      _control_differences(rows),
      page.details('All paired differences', _all_differences(rows)),
    ]
  return '\n'.join(part for part in parts if part)


def copying(datasets: Mapping[str, Any]) -> str:
  """The NLL of a span of shuffled tokens, first time and second."""
  return _noted(
    'A span of tokens in random order is read twice: only by copying can the '
    'second be predicted. A decoder whose second copy is not far below its '
    'first cannot regenerate what it reads.',
    comparison(datasets, 'spans of that many tokens'),
  )


def context_length(datasets: Mapping[str, Any]) -> str:
  """The NLL after contexts of several lengths, the same targets for all."""
  return _noted(
    'All lengths s predict the same outputs; a shorter context is the last s '
    'tokens of the longest.',
    comparison(datasets),
  )


def passages(datasets: Mapping[str, Any]) -> str:
  """NLL and hits where one of several passages is useful."""
  names = {'nll': NLL, 'hit': 'hit'}
  note = (
    'One passage of each context is the text before the output, the others are '
    'of other documents, in random order. Hit: the share of the expanded '
    'chunks that lie in the useful one (higher is better); chance: what random '
    'ones hit. ± standard error.'
  )
  return _by_dataset(datasets, names, note)


def details(datasets: Mapping[str, Any]) -> str:
  """NLL by place of the output, gains by distance, exact spans."""
  parts = (
    (r'o(\d+)', 'output {}', 'The NLL of the n-th output alone'),
    (r'd(\d+)', 'chunk −{}', 'By how much expanding the n-th chunk before the '
     'output lowers the NLL'),
    (r'(exact)', '{}', 'The share of numbers or identifiers whose tokens are '
     'all the most probable ones'),
  )  # fmt: skip
  out = []
  for pattern, label, note in parts:
    places = {
      column: found[1]
      for value in datasets.values()
      for _, row in rows_of(value)
      for column in row
      if (found := re.fullmatch(pattern, column))
    }
    names = {
      column: label.format(place)
      for column, place in places.items()
      if not place.isdigit() or int(place).bit_count() == 1
    }
    note += '; ± standard error. results.json has every place.'
    out.append(_by_dataset(datasets, names, note) if names else '')
  return '\n'.join(filter(None, out))


def _noted(note: str, table: str) -> str:
  return f'<p class="note">{page.text(note)}</p>\n{table}' if table else ''


def _by_dataset(
  datasets: Mapping[str, Any],
  names: Mapping[str, str],
  note: str,
  more: Callable[[Mapping, Mapping], str] = lambda *_: '',
) -> str:
  parts = []
  for dataset, value in datasets.items():
    parts += [f'<h3>{page.text(dataset)}</h3>', _notes(value)]
    parts += [*_measures(value, names, note), more(value, names)]
  return '\n'.join(part for part in parts if part)


def _levels(rows: Sequence[tuple[str, Mapping[str, Any]]], what: str) -> str:
  lengths = lengths_of([row for _, row in rows])
  bits = [x for x in lengths if any(_bits(row, x) for _, row in rows)]
  body = [
    [
      page.name(name),
      *(page.measured(row.get(x)) for x in lengths),
      *(page.number(_bits(row, x)) for x in bits),
      _count([row.get(x) for x in lengths]),
    ]
    for name, row in rows
    if lengths_of([row])
  ]
  groups = [('', 1), (NLL, len(lengths))]
  groups += [('bits per byte', len(bits))] if bits else []
  head = ['row', *lengths, *bits, 'n']
  note = (
    f'Lower is better. P and a number: {what}. ± standard error over '
    'documents, n: documents.'
  )
  return page.table(head, body, note, [*groups, ('', 1)])


def _control_differences(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
  lengths = lengths_of([row for _, row in rows])
  controls = {
    pattern: label
    for pattern, label in CONTROLS.items()
    if any(_against(name, row, pattern) for name, row in rows)
  }
  body = [
    [
      page.name(name),
      *(
        difference(_against(name, row, pattern).get(length))
        for pattern in controls
        for length in lengths
      ),
      _count(
        [_against(name, row, c).get(x) for c in controls for x in lengths]
      ),
    ]
    for name, row in rows
    if any(_against(name, row, pattern) for pattern in controls)
  ]
  groups = [(f'minus {page.name(c)}', len(lengths)) for c in controls.values()]
  head = ['row', *lengths * len(controls), 'n']
  return page.table(head, body, MARKS, [('', 1), *groups, ('', 1)])


def selection(datasets: Mapping[str, Any]) -> str:
  """The two figures of a data set side by side, then their tables."""
  # Here: evals are imported at every start, and matplotlib takes its time.
  from refrag_jax.report import figures

  parts = []
  for dataset, rows in datasets.items():
    pictures, tables = '', []
    for tail in (False, True):
      own = [r for r in rows if bool(r.get('tail_expanded')) == tail]
      title = (
        'tail chunks expanded in every row' if tail else 'chosen chunks only'
      )
      drawn = [r for r in own if (r.get('nll') or {}).get('mean') is not None]
      if drawn:
        name = f'{dataset}: {title}'
        picture = figures.selection_curve(name, title, drawn, NLL)
        pictures += f'<figure>{picture}</figure>'
      table = _selection_table(own, MARKS if not tables else '')
      if table:
        tables += [f'<h3>{page.text(dataset)}: {title}</h3>', table]
    if pictures:
      pictures = (
        f'<div class="grid wide">{pictures}</div><p class="note">Lower is '
        'better, further right is shorter for the decoder. Bars: one standard '
        'error over documents. It is the same documents for every selector, so '
        'the paired differences below can be sure where bars overlap.</p>'
      )
    parts += [f'<h3>{page.text(dataset)}</h3>', pictures, *tables]
  return '\n'.join(part for part in parts if part)


def _selection_table(rows: Sequence[Mapping[str, Any]], note: str) -> str:
  others = dict.fromkeys(k for r in rows for k in r if k.startswith('vs_'))
  body = [
    [
      page.name(row['selector'] if row['p'] else 'none'),
      f'{row["p"]:g}',
      page.number(row.get('rate'), 2),
      page.measured(row.get('nll')),
      *(difference(row.get(key)) for key in others),
      _count([row.get('nll')]),
    ]
    for row in rows
  ]
  names = [f'minus {page.name(key.removeprefix("vs_"))}' for key in others]
  return page.table(['selector', 'p', 'rate', NLL, *names, 'n'], body, note)


def questions(datasets: Mapping[str, Any]) -> str:
  names = {
    'gold_nll': 'gold answer NLL',
    'em': 'exact match',
    'f1': 'F1',
    'accuracy': 'accuracy',
    'rouge1': 'ROUGE-1',
    'rouge2': 'ROUGE-2',
    'rougeL': 'ROUGE-L',
  }
  note = (
    'Gold-answer NLL in nats per token (lower is better); of what is written '
    'exact match, F1 or ROUGE, of multiple choice the share whose likeliest '
    'option is the right one (higher is better). ± standard error.'
  )
  return _by_dataset(datasets, names, note, _equal_latency)


def _equal_latency(dataset: Mapping[str, Any], names: Mapping[str, str]) -> str:
  """REFRAG beside what full context reads in the same time, Figure 4."""
  pairs = dataset.get('at_equal_latency', ())
  measures = [m for m in names if any(m in dataset[x['row']] for x in pairs)]
  body = []
  for pair in pairs:
    row, other = dataset[pair['row']], dataset[pair['full_context']]
    costs = [of['first_token'][pair['by']] for of in (row, other)]
    body.append(
      [
        page.name(pair['row']),
        page.name(pair['full_context']),
        {'gflop': 'GFLOP', 'milliseconds': 'ms'}[pair['by']],
        *(
          page.measured(x) if isinstance(x, dict) else page.number(x, 1)
          for x in costs
        ),
        *(
          difference(
            row['vs'][pair['full_context']].get(m), higher_is_better=m in SCORES
          )
          for m in measures
        ),
      ]
    )
  head = ['row', 'full context', 'by', 'its cost', 'cost of the other']
  note = (
    'What the first token of one question costs, passages in hand, chunks '
    'encoded in it; beside each row the one with full context, of the numbers '
    'of passages tried, that costs the most and no more than it. ' + MARKS
  )
  return page.table(
    [*head, *(f'{names[m]}, difference' for m in measures)], body, note
  )


def regeneration(datasets: Mapping[str, Any]) -> str:
  """How much of its source was written, then the first few texts."""
  names = {'share': 'written', 'same_place': 'in its place'}
  note = (
    "Shares of the source's tokens that were written greedily from its chunk "
    'embeddings, wherever they stand and where they stand; shuffled: from '
    "another document's, against the same source. ± standard error."
  )
  parts = []
  for dataset, value in datasets.items():
    texts = [
      [
        page.name(text['row']),
        page.text(text['source']),
        page.text(text['written']),
      ]
      for text in value.get('texts', ())
    ]
    parts += [
      f'<h3>{page.text(dataset)}</h3>',
      *_measures(value, names, note),
      page.table(['row', 'source', 'written'], texts, css_class='text'),
    ]
  return '\n'.join(parts)


def _measures(
  dataset: Mapping[str, Any], names: Mapping[str, str], note: str
) -> list[str]:
  """A data set's rows by the named measures, and all their differences."""
  rows = [x for x in rows_of(dataset) if names.keys() & x[1].keys()]
  measures = [m for m in names if any(m in row for _, row in rows)]
  body = [
    [
      page.name(name) + _uninformative(row),
      *(page.measured(row.get(m)) for m in measures),
      _count([row.get(m) for m in measures]),
    ]
    for name, row in rows
  ]
  head = ['row', *(names[m] for m in measures), 'n']
  return [
    page.table(head, body, note),
    page.details('All paired differences', _all_differences(rows)),
  ]


def rows_of(dataset: Mapping[str, Any]) -> Iterator[tuple[str, Mapping]]:
  """The rows of a data set; other values beside them are its notes."""
  return ((k, v) for k, v in dataset.items() if isinstance(v, Mapping))


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  names = {key for row in rows for key in row if re.fullmatch(r'P\d+', key)}
  return sorted(names, key=lambda key: int(key[1:]))


def difference(value: Stat | None, higher_is_better: bool = False) -> str:
  if not value or value.get('mean') is None:
    return page.measured(value) + page.UNDECIDED
  mark = page.UNDECIDED
  if results.significant(value):
    better = (value['mean'] > 0) == higher_is_better
    mark = page.GOOD if better else page.BAD
  return f'{page.measured(value, 4, sign=True)} {mark}'


def _all_differences(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
  body = [
    [
      page.name(name),
      page.name(other),
      page.text(measure),
      difference(value, higher_is_better=measure in SCORES),
      _count([value]),
    ]
    for name, row in rows
    for other, values in row.get('vs', {}).items()
    for measure, value in values.items()
    if isinstance(value, Mapping)
  ]
  head = ['row', 'minus', 'of', 'difference', 'n']
  return page.table(head, body, MARKS)


def _against(
  name: str, row: Mapping[str, Any], pattern: str
) -> Mapping[str, Any]:
  """The differences from a row's own control of that name.

  That is its own with an ending where there is one, or one of the same context
  length, or the first.
  """
  found = {
    other: values
    for other, values in row.get('vs', {}).items()
    if re.fullmatch(pattern, other)
  }
  length = re.search(r'_s\d+', name)
  same = [o for o in found if length and re.search(length[0] + r'(?!\d)', o)]
  best = [o for o in found if o.startswith(f'{name}_')] + same + list(found)
  return found[best[0]] if best else {}


def _bits(row: Mapping[str, Any], length: str) -> float | None:
  beside = row.get('bits_per_byte')
  if isinstance(beside, Mapping):
    value = beside.get(length)
  else:
    value = (row.get(length) or {}).get('bits_per_byte')
  return value.get('mean') if isinstance(value, Mapping) else value


def _count(values: Sequence[Stat | None]) -> str:
  counts = {value['n'] for value in values if value and 'n' in value}
  if not counts:
    return page.MISSING
  low, high = min(counts), max(counts)
  return page.number(low) if low == high else f'{low:,}–{high:,}'


def _notes(dataset: Mapping[str, Any]) -> str:
  lines = []
  for key, value in dataset.items():
    if isinstance(value, Mapping | list) or value in (False, None):
      continue
    words = key if value is True else f'{key}: {value}'
    alarming = 'uninformative' in words.lower()
    style = 'banner' if alarming else 'note'
    if alarming:
      words += ' (full context does not beat no context here: these questions '
      words += 'cannot tell whether passages are read)'
    lines.append(f'<p class="{style}">{page.text(words)}</p>')
  return ''.join(lines)


def _uninformative(row: Mapping[str, Any]) -> str:
  said = any(
    'uninformative' in (key if value is True else str(value)).lower()
    for key, value in row.items()
    if not isinstance(value, Mapping)
  )
  return ' <span class="bad">uninformative</span>' if said else ''


def _unchanged(value: Mapping[str, Any]) -> str:
  unchanged = value.get('frozen_unchanged')
  if unchanged is None or not value.get('frozen_params'):
    return page.MISSING
  return 'yes' if unchanged else '<span class="bad">no: changed</span>'


def _seconds(value: float | None) -> str:
  return page.MISSING if value is None else f'{page.number(float(value), 1)} s'


def _whole(value: float | None) -> str:
  return page.MISSING if value is None else page.number(round(value))
