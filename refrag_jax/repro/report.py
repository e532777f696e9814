"""RESULTS.md and repro.html: what the arms of an ablation showed.

Every number on these pages comes from the runs' records (records.py)
or, where it says so, from the paper (paper_tables.py); none is
written here. What is missing is shown as missing.
"""

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refrag_jax.report import page
from refrag_jax.repro import figures, tables
from refrag_jax.repro import records as records_lib
from refrag_jax.repro import verdicts as claims
from refrag_jax.repro.page import (
  MISSING,
  Heading,
  Items,
  Picture,
  Section,
  Table,
  Text,
  html,
  markdown,
  shown_estimate,
  shown_interval,
)
from refrag_jax.repro.questions import filled, formula, preset_of, rule_of
from refrag_jax.repro.records import Records, Run
from refrag_jax.repro.verdicts import Finding, Part, Verdict
from refrag_jax.runtime import files


def write(
  workdir: str,
  spec: Mapping[str, Any],
  records: Records,
  verdicts: Sequence[Verdict],
  failures: Mapping[str, str],
) -> None:
  """Writes RESULTS.md and repro.html into the workdir.

  Args:
    workdir: of `--mode=repro`; its config_repro.json says the command.
    spec: the claims file, parsed.
    records: of the runs that count.
    verdicts: of `claims.judge`.
    failures: 'seed0/k16': why that arm failed, for those of this call.
  """
  preset = preset_of(spec, records)
  parts = {
    'Verdicts': _summary(verdicts, records),
    'What ran': _runs(workdir, spec, records, failures),
    'How it is decided': _rules(spec, preset, records),
    'Preconditions': _preconditions(spec, records),
    'Claims': (block for verdict in verdicts for block in _claim(verdict)),
    'Beside the paper': tables.beside(spec, preset, records),
    'Beyond the paper': tables.beyond(preset, records),
    'What the context costs': tables.costs(preset, records),
    'Learning curves': tables.curves(records),
    'Every row': tables.every_row(records),
  }
  sections = [Section(title, list(blocks)) for title, blocks in parts.items()]
  name = records.config or 'no runs'
  title = f'The claims of REFRAG at small scale: {name}'
  for file, text in (
    ('RESULTS.md', markdown(title, sections)),
    ('repro.html', html(title, sections)),
  ):
    files.write_text(os.path.join(workdir, file), text)


# --- Verdicts -----------------------------------------------------------------


def _summary(verdicts: Sequence[Verdict], records: Records) -> Iterator:
  if not verdicts:
    yield Text('The claims file has no claims.')
    return
  outcomes = [verdict.verdict for verdict in verdicts]
  counts = (
    f'{outcomes.count(outcome)} {outcome}'
    for outcome in dict.fromkeys(
      (claims.CONFIRMED, claims.CONTRARY, claims.UNDECIDED, claims.UNTESTABLE)
    )
  )
  seeds = sorted({seed for seed, _ in records.runs})
  yield Text(
    f'{len(verdicts)} claims: {", ".join(counts)}; from {len(records.runs)} '
    f'runs with {_plural(len(seeds), "seed")}. A contrary verdict is a result. '
    'What decides was fixed before the runs and stands below; what is known to '
    'be weak about it stands in `docs/repro.md`.'
  )
  yield from _setting(records)
  yield Table(
    ('claim', 'says', 'paper', 'verdict', 'why'),
    [
      (str(v.number), v.title, v.paper, v.verdict, v.why) for v in verdicts
    ],
    prose=(1, 2, 4),
  )  # fmt: skip


def _setting(records: Records) -> Iterator:
  """What was trained, in a few numbers; nothing without its config."""
  main = tables.first_run(records, 'main')
  if main is None or not main.config:
    return
  model, stage = main.config['model'], main.config['stage']
  sizes = {
    name: f'{name} {of["num_layers"]} layers deep and {of["width"]} wide'
    for name, of in model.items()
    if name in ('decoder', 'encoder')
  }
  lm = main.results.get('stages', {}).get('lm', {})
  if lm.get('trainable_params'):
    sizes['decoder'] += f' ({page.number(lm["trainable_params"])} parameters)'
  window = stage['cpt']
  yield Text(
    f'In `main`: {", ".join(sizes.values())}; tokens of '
    f'`{main.config["data"]["tokenizer"]}`; s = {window["context_length"]} '
    f'tokens of context in chunks of k = {model["chunk_size"]}, o = '
    f'{window["output_length"]} of output. P16 is the NLL of the first 16 '
    'tokens of the output, in nats per token.'
  )


def _claim(verdict: Verdict) -> Iterator:
  yield Heading(f'{verdict.number}. {verdict.title}: {verdict.verdict}')
  yield Text(f'{verdict.sentence} ({verdict.paper}.) {_sentence(verdict.why)}')
  if verdict.failed:
    missed = {}
    for dataset, names in verdict.failed.items():
      missed.setdefault(', '.join(names), []).append(dataset)
    yield Items([
      f'Not counted: {", ".join(of)}: precondition {names}'
      for names, of in missed.items()
    ])  # fmt: skip
  yield Picture(list(_forests(verdict)), _FOREST)
  decide = [part for part in verdict.parts if not part.test.also]
  beside = [part for part in verdict.parts if part.test.also]
  yield _part_table(decide, _PART_NOTE)
  yield _part_table(beside, folded='Reported beside them, deciding nothing')
  yield Table(
    ('test', 'statement about cells'),
    [(part.test.says, formula(part.test)) for part in verdict.parts],
    folded='The cells of these tests',
    prose=(0, 1),
  )


_FOREST = (
  'Pooled estimate with its bootstrap interval; `|`: each seed alone; `x`: the '
  'margin on both sides, where the test has one. Of a difference: left of zero '
  'the first cell is lower, which is better.'
)
_PART_NOTE = (
  'Estimate: the left side less the right side of the test (a slope or share '
  'where it is one), mean ± standard error over documents, paired; interval: '
  'bootstrap over documents; n: documents. Of seeds: the same for each alone.'
)


def _part_table(
  parts: Sequence[Part], note: str = '', folded: str = ''
) -> Table:
  seeds = sorted({s for p in parts for f in p.findings for s in f.seeds})
  head = ('test, data set', 'outcome', 'estimate', 'interval', 'n', 'margin')
  rows = []
  for part in parts:
    why = part.why if part.outcome == claims.UNTESTABLE else ''
    rows.append((
      part.test.says, _reasoned(part.outcome, why),
      *[''] * (len(head) - 2 + len(seeds)),
    ))  # fmt: skip
    if any(f.pooled for f in part.findings):
      rows += [_finding_row(part, f, seeds) for f in part.findings]
  head += tuple(f'seed {seed}' for seed in seeds)
  return Table(head, rows, note if rows else '', folded, prose=(0, 1))


def _finding_row(part: Part, f: Finding, seeds: Sequence[int]) -> tuple:
  digits = 3 if part.test.unit.startswith('share') else 4
  return (
    f'– {f.dataset}',
    _reasoned(f.outcome, f.why),
    shown_estimate(f.pooled, digits),
    shown_interval(f.pooled, digits),
    page.number(f.pooled.n) if f.pooled else page.MISSING,
    page.MISSING if f.margin is None else page.number(f.margin, digits),
    *(
      shown_estimate(f.seeds[seed], digits) if seed in f.seeds else MISSING
      for seed in seeds
    ),
  )


def _reasoned(outcome: str, why: str) -> str:
  return f'{outcome}: {why}' if why else outcome


def _forests(verdict: Verdict) -> Iterator[str]:
  """One figure a unit, of the tests that decide."""
  parts = [part for part in verdict.parts if not part.test.also]
  for unit in dict.fromkeys(part.test.unit for part in parts):
    groups = {}
    for part in parts:
      bars = [
        figures.Bar(
          f.dataset, f.pooled.mean, f.pooled.low, f.pooled.high,
          [e.mean for e in f.seeds.values() if e.mean is not None], f.margin,
        )
        for f in part.findings
        if f.pooled and None not in (f.pooled.mean, f.pooled.low)
      ]  # fmt: skip
      if bars and part.test.unit == unit:
        groups[part.test.says] = bars
    if groups:
      yield figures.forest(
        f'claim{verdict.number}-{unit}', f'Claim {verdict.number}', unit, groups
      )


# --- What ran -----------------------------------------------------------------


def _runs(workdir, spec, records: Records, failures) -> Iterator:
  path = os.path.join(workdir, 'config_repro.json')
  saved = files.read_json(path) if os.path.exists(path) else {}
  runs = list(records.runs.values())
  commands = dict.fromkeys(
    ' '.join(map(str, of['command_line']))
    for of in (saved, *(run.saved for run in runs))
    if of.get('command_line')
  )
  yield Table(
    ('command',),
    [(f'`{command}`',) for command in commands],
    folded=f'By {_plural(len(commands), "command")}',
    prose=(0,),
  )
  if runs:
    versions = runs[0].results.get('versions', {})
    yield Text(
      f'Corpus `{records.corpus[:12]}`. '
      + ', '.join(f'{name} {value}' for name, value in versions.items())
      + '.'
    )
    others = [
      run.name for run in runs if run.results.get('versions') != versions
    ]
    if others:
      yield Text(f'With other versions: {", ".join(others)}.')
  asked = saved.get('config', {}).get('repro', {})
  seeds, arms = _expected(spec, records, asked)
  rows, total = [], 0.0
  for arm in arms:
    own = {run.seed: run for run in runs if run.arm == arm}
    wall = {seed: _wall(run) for seed, run in own.items()}
    total += sum(wall.values())
    shared = lambda values: ', '.join(dict.fromkeys(values)) or page.MISSING
    rows.append((
      f'`{arm}`', shared(_budget(run) for run in own.values()),
      *(page.number(round(wall[s])) if s in own else MISSING for s in seeds),
      shared(run.results.get('device', '') for run in own.values()),
      shared(f'`{run.results.get("git", "")}`' for run in own.values()),
      shared(_date(run) for run in own.values()),
    ))  # fmt: skip
  heads = (f'seed {seed}, wall s' for seed in seeds)
  yield Table(
    ('arm', 'stages: steps × sequences', *heads, 'device', 'git', 'date'),
    rows,
    f'Wall time of the stages, {page.number(round(total))} s in all; evals '
    'come on top. Date: when its results were written.' if rows else '',
    prose=(1,),
  )  # fmt: skip
  changes = {run.arm: run.saved['changes'] for run in runs
             if run.saved.get('changes')}  # fmt: skip
  yield Table(
    ('arm', 'what it changes'),
    [(f'`{arm}`', ', '.join(f'`{c}`' for c in of)) for arm, of in
     changes.items()],
    folded='What each arm changes in the config',
    prose=(1,),
  )  # fmt: skip
  for title, texts in (
    ('Failed in this call', [f'`{k}`: {v}' for k, v in failures.items()]),
    ('Left out', records.notes),
  ):
    if texts:
      yield Heading(title)
      yield Items(texts)
  rates = claims.learning_rates(spec, records)
  yield Table(
    ('stage', 'grid', 'peak learning rate', 'departs'),
    [_rate_row(*entry) for entry in rates],
    'Peak learning rates: the grid fixed beforehand, and what was used.'
    if rates else '',
    folded='Learning rates',
    prose=(2, 3),
  )  # fmt: skip


def _expected(spec, records: Records, asked) -> tuple[list[int], list[str]]:
  """Seeds and arms: all that ran, were asked for, or that a test needs."""
  arms = dict.fromkeys(asked.get('arms') or asked.get('arm') or ())
  arms |= dict.fromkeys(arm for _, arm in records.runs)
  claim_tests = (
    test
    for claim in filled(spec.get('claim', ()), preset_of(spec, records))
    for test in claim['test']
  )
  arms |= dict.fromkeys(
    records_lib.split(cell)[0] for test in claim_tests for cell in test['cells']
  )
  seeds = {seed for seed, _ in records.runs} | set(asked.get('seeds') or ())
  return sorted(seeds), sorted(arms, key=lambda arm: arm != 'main')


def _wall(run: Run) -> float:
  """Seconds of all its stages, interruptions left out."""
  stages = run.results.get('stages', {})
  return sum(record.get('wall_s') or 0.0 for record in stages.values())


def _rate_row(stage: str, grid, rates: Mapping[float, list[str]]) -> tuple:
  usual = max(rates, key=lambda rate: len(rates[rate]))
  away = [run for rate in rates if rate != usual for run in rates[rate]]
  away += [f'{usual:g} is not in the grid'] * (usual not in grid)
  used = ', '.join(f'{rate:g} ({len(rates[rate])} runs)' for rate in rates)
  shown = ', '.join(f'{rate:g}' for rate in grid) or MISSING
  return f'`{stage}`', shown, used, ', '.join(away) or page.MISSING


def _budget(run: Run) -> str:
  """Stages with their steps and, where the config is there, their batches."""
  parts = []
  for stage, record in run.results.get('stages', {}).items():
    fields = run.config.get('stage', {}).get(stage, {})
    size = f' × {fields["batch_size"]:,}' if fields.get('batch_size') else ''
    parts.append(f'`{stage}` {record.get("steps", 0):,}{size}')
  return ', '.join(parts)


def _date(run: Run) -> str:
  """When its results were written: a report made later changes nothing."""
  if run.results.get('date'):
    return run.results['date']
  path = os.path.join(run.directory, 'results.json')
  written = datetime.datetime.fromtimestamp(os.path.getmtime(path))
  return written.strftime('%Y-%m-%d %H:%M')


# --- Rules and preconditions --------------------------------------------------


def _rules(spec, preset, records: Records) -> Iterator:
  if not spec.get('statistics'):
    return
  rule = rule_of(spec)
  yield Text(
    'Documents are the unit, and arms are paired by document. A difference '
    f'counts above {rule.standard_errors:g} of its standard errors, with a '
    f'bootstrap interval (level {rule.level:g}, '
    f'{page.number(rule.resamples)} resamples of the documents, seed '
    f'{rule.seed}) that excludes 0, and with the same sign in each of '
    f'{preset["seeds"]} seeds. “About” and “a little” are '
    f'{spec["statistics"]["margin"]:.0%} of the gap between no and full '
    f'context, trained alike. A test needs {preset["domains"]} data sets and '
    'none that says the contrary. An interval is one over documents, of the '
    'mean over seeds; how much one training differs from another is in the '
    'columns of the seeds.'
  )
  main = tables.first_run(records, 'main')
  drawn = main and main.config.get('stage', {}).get('cpt_trained', {})
  if drawn:
    yield Text(
      'Rows ending in `_trained` are of one decoder that had the further '
      'training of `main` without compression, each step with one of these '
      f'contexts, drawn at random: {", ".join(drawn["contexts"])}.'
    )
  cells = filled(spec['statistics'].get('gap', ()), preset)
  yield Text(
    f'The gap, where a test names no other: `{"` − `".join(cells)}`. The '
    'claims file, with the reasons, is `configs/claims.toml`.'
  )


def _preconditions(spec, records: Records) -> Iterator:
  found = claims.preconditions(spec, records)
  names = dict.fromkeys(name for p in found for name in p.holds)
  yield Table(
    ('precondition', 'says', *names),
    [
      (
        f'`{p.name}`', p.says,
        *({True: 'yes', False: 'no'}.get(p.holds.get(n), MISSING)
          for n in names),
      )
      for p in found
    ],
    prose=(1,),
  )  # fmt: skip
  yield _part_table(
    [part for p in found for part in p.parts],
    _PART_NOTE,
    'The numbers behind the preconditions',
  )


def _plural(number: int, word: str) -> str:
  return f'{page.number(number)} {word}{"s" * (number != 1)}'


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:] + '.' if text else ''
