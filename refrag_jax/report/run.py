"""report.html: what a run measured, on one page that needs no network.

Reads what the run has written so far; a part that is not there is left out, so
a report can be written in the middle of a run. Every number stands with its
standard error and its number of documents, and what is worse than a baseline
is marked like what is better.
"""

import base64
import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refrag_jax import results
from refrag_jax.report import figures as report_figures
from refrag_jax.report import glossary, page
from refrag_jax.report import tables as report_tables
from refrag_jax.runtime import files

Finding = tuple[str, str, str, Mapping[str, Any]]  # task, row, other, STAT

# What REFRAG is held against in the summary. Not `no_context`: more training
# on such text beats that without reading the context.
BASELINES = (
  r'no_context_trained', r'.*shuffled', r'last_k_trained',
  r'full_context_trained',
)  # fmt: skip


def write(workdir: str, evals_by_name: Mapping[str, Any]) -> str:
  """Writes `<workdir>/report.html` and returns its path.

  Args:
    evals_by_name: evals.EVALS, whose tables follow in this order.
  """

  def read(name: str) -> dict[str, Any]:
    path = os.path.join(workdir, name)
    return files.read_json(path) if os.path.exists(path) else {}

  numbers, saved = read('results.json'), read('config.json')
  lines = files.read_lines(os.path.join(workdir, 'metrics.jsonl'))
  tables = files.read_lines(os.path.join(workdir, 'samples.jsonl'))
  scored = read('policy_scores.json').get('examples', [])
  stages, evals = numbers.get('stages', {}), numbers.get('evals', {})
  contents = (
    ('What this run shows', findings(evals)),
    ('Training', curves(stages, lines)),
    ('Stages', report_tables.stage_table(stages)),
    ('Curriculum', curriculum(workdir)),
    ('Checkpoints', checkpoints(numbers.get('checkpoints', {}))),
    *(
      (of.title, of.table(evals.get(name, {})))
      for name, of in evals_by_name.items()
    ),
    ('What the policy expands', policy_pictures(scored)),
    ('Sample texts', samples(tables)),
    ('Left out', left_out(numbers.get('left_out', []))),
    ('Config', config_table(saved)),
  )
  name = numbers.get('config') or saved.get('config', {}).get('name') or 'run'
  title = f'refrag_jax: {name}'
  config = {'config': saved.get('config', {})}
  body = header(title, _date(workdir, numbers), saved | numbers | config)
  body += glossary.glossary(evals)
  body += page.sections([(head, part) for head, part in contents if part])
  path = os.path.join(workdir, 'report.html')
  files.write_text(path, page.page(title, body))
  return path


def header(title: str, date: str, numbers: Mapping[str, Any]) -> str:
  facts = [date, f'git {numbers["git"]}' if numbers.get('git') else '']
  if not numbers.get('evals'):
    facts.append('no evaluation finished yet')
  versions = [f'{k} {v}' for k, v in numbers.get('versions', {}).items()]
  sizes = _sizes(numbers.get('stages', {}), numbers.get('config', {}))
  rows = (facts, sizes, versions)
  lines = (' · '.join(filter(None, parts)) for parts in rows)
  shown = ''.join(f'<p class="muted">{page.text(x)}</p>\n' for x in lines if x)
  command = ' '.join(numbers.get('command_line', []))
  if command:
    shown += f'<p class="muted"><code>{page.text(command)}</code></p>\n'
  return f'<h1>{page.text(title)}</h1>\n{shown}'


def _sizes(stages: Mapping[str, Any], config: Any) -> list[str]:
  """Parameters, chunk size, and how long the stages took."""
  sizes = []
  totals = [
    of['trainable_params'] + of['frozen_params']
    for of in stages.values()
    if 'trainable_params' in of and 'frozen_params' in of
  ]
  if totals:
    sizes.append(f'{max(totals):,} parameters')
  if isinstance(config, Mapping) and 'model' in config:
    sizes.append(f'k = {config["model"]["chunk_size"]}')
  seconds = sum(of.get('wall_s') or 0 for of in stages.values())
  if seconds:
    minutes = f'{seconds / 60:.1f} minutes in {len(stages)} stages'
    sizes.append(minutes + ', without the evals')
  return sizes


def checkpoints(of_role: Mapping[str, Any]) -> str:
  """Which checkpoint the rows of each role are of."""
  rows = [
    [page.name(role), page.text(of['checkpoint']), page.number(of['step'])]
    for role, of in of_role.items()
  ]
  if not rows:
    return ''
  table = page.table(['role', 'checkpoint', 'step'], rows, css_class='text')
  return page.details(f'{len(rows)} checkpoints', table)


def left_out(lines: Sequence[str]) -> str:
  """What was asked for and could not be measured, each with its reason."""
  items = ''.join(f'<li>{page.text(line)}</li>' for line in lines)
  return f'<ul>{items}</ul>\n' if items else ''


def told(workdir: str) -> list[str]:
  """What a run shows, as lines for a terminal; none without evals."""
  evals = files.read_json(os.path.join(workdir, 'results.json'))['evals']
  rows = [
    (task, f'{row} minus {other}', _signed(value), verdict(value))
    for task, row, other, value in found(evals)
  ]
  if not rows:
    return []
  wide = [max(len(row[i]) for row in rows) for i in range(3)]
  return [
    'What this run shows, in nats per token: negative is better, ± standard '
    'error over documents',
    *(
      '  '.join(
        ['', *(f'{x:{w}}' for x, w in zip(row[:3], wide, strict=True)), row[3]]
      )
      for row in rows
    ),
  ]


def _signed(value: Mapping[str, Any]) -> str:
  if value.get('mean') is None:
    return 'not measured'
  se = value.get('se')
  return f'{value["mean"]:+.3f} ± {se:.3f}' if se else f'{value["mean"]:+.3f}'


def found(evals: Mapping[str, Any]) -> list[Finding]:
  """The comparisons that decide whether the context was read."""
  return [*_against_baselines(evals), *_policy_against_rules(evals)]


def findings(evals: Mapping[str, Any]) -> str:
  """`found`, in words."""
  body = [
    [
      page.text(task),
      page.name(row),
      page.name(other),
      page.measured(value, 4, sign=True),
      _styled(verdict(value)),
      page.number(value.get('n')),
    ]
    for task, row, other, value in found(evals)
  ]
  head = ['task', 'row', 'minus', 'nats per token', 'verdict', 'n']
  note = (
    'Differences in held-out NLL, paired on the same documents, ± standard '
    'error over documents: negative is better. A verdict needs more than three '
    'standard errors.'
  )
  return page.table(head, body, note)


def _against_baselines(evals: Mapping[str, Any]) -> Iterator[Finding]:
  """REFRAG at the shortest length, minus each baseline."""
  for part in ('log_perplexity', 'reconstruction'):
    for dataset, rows in evals.get(part, {}).items():
      for row, values in report_tables.rows_of(rows):
        if part == 'log_perplexity' and not re.fullmatch(r'refrag_k\d+', row):
          continue
        if not row.startswith('refrag'):  # a baseline against another
          continue
        for other, diffs in values.get('vs', {}).items():
          lengths = report_tables.lengths_of([diffs])
          if lengths and any(re.fullmatch(b, other) for b in BASELINES):
            task = f'{part.replace("_", "-")}, {dataset}, {lengths[0]}'
            yield task, row, other, diffs[lengths[0]]


def _policy_against_rules(evals: Mapping[str, Any]) -> Iterator[Finding]:
  for dataset, rows in evals.get('selection', {}).items():
    for row in rows:
      for other in ('random', 'last') if row['selector'] == 'rl' else ():
        if row.get(f'vs_{other}'):
          tail = ', tail expanded' * bool(row.get('tail_expanded'))
          task = f'selection, {dataset}, p = {row["p"]:g}{tail}'
          yield task, 'rl', other, row[f'vs_{other}']


def verdict(value: Mapping[str, Any]) -> str:
  """'better', 'worse', or why neither."""
  if value.get('se') is None:
    return 'no se'
  if not results.significant(value):
    return 'within 3 se'
  return 'better' if value['mean'] < 0 else 'worse'


def _styled(verdict: str) -> str:
  style = {'better': 'good', 'worse': 'bad'}.get(verdict)
  return f'<span class="{style}">{verdict}</span>' if style else verdict


def curves(
  stages: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> str:
  """One small figure a stage, in the order in which the stages ran."""
  names = dict.fromkeys([*stages, *(str(x.get('stage')) for x in lines)])
  figures = []
  for stage in names:
    own = [line for line in lines if str(line.get('stage')) == stage]
    reward = any('reward' in line for line in own)
    quantity = 'reward' if reward else 'loss'
    train, heldout = (_points(own, x, quantity) for x in ('train', 'heldout'))
    if train[0] or heldout[0]:
      picture = report_figures.loss_curve(stage, quantity, train, heldout)
      figures.append(f'<figure>{picture}</figure>')
  if not figures:
    return ''
  note = (
    '<p class="note">Thin: every logged value. Thick: running mean over a '
    'twentieth of the stage. Batches of one curriculum factor differ in '
    'length, which is what makes the thin line jump.</p>'
  )
  return f'<div class="grid">{"".join(figures)}</div>{note}'


def curriculum(workdir: str) -> str:
  for name, kind in (('curriculum.svg', 'svg+xml'), ('curriculum.png', 'png')):
    path = os.path.join(workdir, name)
    if os.path.exists(path):
      with open(path, 'rb') as f:
        data = base64.b64encode(f.read()).decode('ascii')
      image = f'<img alt="curriculum" src="data:image/{kind};base64,{data}">'
      return page.figure(image, 'Share of each factor (chunks) over the steps.')
  return ''


def policy_pictures(examples: Sequence[Mapping[str, Any]]) -> str:
  if not examples:
    return ''
  legend = (
    '<p class="note">policy score, within each context: lowest'
    '<span class="ramp"></span>highest. '
    '<span class="chunk expanded">Outlined and bold</span>: expanded, read as '
    'tokens; the others are one embedding each. ↵ is a line break.</p>'
  )
  return legend + '\n'.join(map(_context, examples))


def samples(tables: Sequence[Mapping[str, Any]]) -> str:
  """The last table of each stage."""
  last = {record.get('stage'): record for record in tables}
  parts = []
  for stage, record in last.items():
    rows = record.get('rows', [])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    body = [[page.text(row.get(c, '')) for c in columns] for row in rows]
    parts.append(f'<h3>{page.text(stage)}, step {record.get("step")}</h3>')
    parts.append(
      page.table(list(map(page.text, columns)), body, css_class='text')
    )
  return '\n'.join(parts)


def config_table(saved: Mapping[str, Any]) -> str:
  """Every value and where it came from, folded away."""
  sources = saved.get('sources', {})
  rows = [
    [page.name(key), page.name(value), page.text(sources.get(key, ''))]
    for key, value in _flatten('', saved.get('config', {}))
  ]
  head = ['field', 'value', 'source']
  return page.details(
    f'{len(rows)} values', page.table(head, rows, css_class='text')
  )


def _points(
  lines: Sequence[Mapping[str, Any]], split: str, quantity: str
) -> tuple[list[int], list[float]]:
  points = [
    (line['step'], line[quantity])
    for line in lines
    if line.get('split') == split and line.get(quantity) is not None
  ]
  return [step for step, _ in points], [value for _, value in points]


def _context(example: Mapping[str, Any]) -> str:
  scores = example['scores']
  low, high = min(scores, default=0.0), max(scores, default=0.0)
  spans = []
  for i, (chunk, score, expanded) in enumerate(
    zip(example['text_chunks'], scores, example['expanded'], strict=True)
  ):
    share = (score - low) / (high - low) if high > low else 0.5
    style = 'chunk expanded' if expanded else 'chunk'
    words = 'expanded' if expanded else 'compressed'
    spans.append(
      f'<span class="{style}" title="chunk {i}, score {score:.4f}, {words}" '
      f'style="background:rgb(var(--score) / {0.04 + 0.56 * share:.2f})">'
      f'{page.text(chunk).replace(chr(10), "↵")}</span>'
    )
  count = sum(map(bool, example['expanded']))
  return (
    f'<figure><div class="context">{"".join(spans)}</div><figcaption>document '
    f'{page.text(example.get("doc", "?"))}, {count} of {len(scores)} chunks '
    f'expanded; scores {page.number(float(low))} to {page.number(float(high))}.'
    f' What follows: <code>{page.text(example.get("output", ""))}</code>'
    '</figcaption></figure>'
  )


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
  if isinstance(value, Mapping):
    for key, inner in value.items():
      yield from _flatten(f'{prefix}.{key}' if prefix else str(key), inner)
  else:
    yield prefix, value


def _date(workdir: str, numbers: Mapping[str, Any]) -> str:
  """When the results were written: a report made later changes nothing."""
  path = os.path.join(workdir, 'results.json')
  if numbers.get('date') or not os.path.exists(path):
    return numbers.get('date', '')
  written = datetime.datetime.fromtimestamp(os.path.getmtime(path))
  return written.strftime('%Y-%m-%d %H:%M')
