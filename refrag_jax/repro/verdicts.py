"""The paper's claims, judged by the records of the runs.

What is tested, how, and what a verdict takes is written in configs/claims.toml,
before the runs; this file is its meaning. Nothing here trains or needs JAX:
`judge` is a pure function of that file and of the records.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from refrag_jax.repro import records as records_lib
from refrag_jax.repro.estimate import Estimate, Rule, contrast, estimates
from refrag_jax.repro.questions import (
  KINDS,
  ClaimTest,
  Question,
  filled,
  preset_of,
  read_needs,
  read_test,
  rule_of,
)
from refrag_jax.repro.records import Records, load

__all__ = ['gap_closed', 'judge', 'learning_rates', 'load', 'preconditions']

CONFIRMED, CONTRARY = 'confirmed', 'contrary'
UNDECIDED, UNTESTABLE = 'undecided', 'not testable'
# Of a test, beside the last three.
HOLDS = 'holds'
MEASURED = 'measured'  # a share without a bound: a number, nothing to decide
VERBS = {HOLDS: 'holds', CONTRARY: 'comes out the other way'}


@dataclasses.dataclass(frozen=True)
class Finding:
  """A test on one data set: what came out, and the numbers behind it."""

  dataset: str
  outcome: str
  why: str  # '' where the numbers say it
  pooled: Estimate | None  # each document's mean over the seeds that have it
  seeds: Mapping[int, Estimate]
  margin: float | None  # where the test has one


@dataclasses.dataclass(frozen=True)
class Part:
  """A test over all data sets."""

  test: ClaimTest
  outcome: str
  why: str
  findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Precondition:
  name: str
  says: str
  parts: tuple[Part, ...]
  holds: Mapping[str, bool]  # by data set


@dataclasses.dataclass(frozen=True)
class Verdict:
  number: int
  title: str
  sentence: str
  paper: str  # its table or figure
  verdict: str
  why: str  # a sentence
  parts: tuple[Part, ...]
  failed: Mapping[str, tuple[str, ...]]  # data set: preconditions not met there


class Bench(NamedTuple):
  """What every test is judged with."""

  spec: Mapping[str, Any]
  preset: Mapping[str, Any]
  records: Records
  met: Mapping[str, Precondition]
  seeds: int  # that a test needs
  domains: int


def judge(spec: Mapping[str, Any], records: Records) -> list[Verdict]:
  """A verdict for each claim, in the order of the file.

  Args:
    spec: configs/claims.toml, parsed; {} has no claims.
    records: as `load` returns them.

  Raises:
    UserError: the file names an unknown test, precondition or cell, or has no
      preset for the config of these runs.
  """
  preset = preset_of(spec, records)
  met = {p.name: p for p in preconditions(spec, records)}
  bench = Bench(
    spec, preset, records, met, preset.get('seeds', 1), preset.get('domains', 1)
  )
  return [_verdict(filled(raw, preset), bench) for raw in spec.get('claim', ())]


def preconditions(
  spec: Mapping[str, Any], records: Records
) -> list[Precondition]:
  """Where each precondition holds; the errors of `judge`.

  With the seeds that there are: a missing one leaves a claim undecided, which
  says more than that it cannot be tested.
  """
  preset, out = preset_of(spec, records), []
  bench = Bench(spec, preset, records, {}, 1, 1)
  for name, raw in filled(spec.get('precondition', {}), preset).items():
    tests = [
      read_test(test, spec, preset, f'precondition {name}')
      for test in raw['test']
    ]
    parts = tuple(_part(test, (), bench) for test in tests)
    passed = [
      {f.dataset for f in part.findings if f.outcome == HOLDS} for part in parts
    ]
    names = dict.fromkeys(f.dataset for part in parts for f in part.findings)
    holds = {name: all(name in of_part for of_part in passed) for name in names}
    if not all(_tested(part) for part in parts):
      holds = {}  # an arm is missing: nothing has failed yet
    out.append(Precondition(name, raw['says'], parts, holds))
  return out


def _tested(part: Part) -> bool:
  return any(f.outcome != UNTESTABLE for f in part.findings)


def gap_closed(none, reached, *full) -> float:
  """The share of the no-context to full-context gap that a model closes.

  Footnote 2 of the paper: (none - reached) / (none - full), each summed over
  data sets before they are divided, `full` being on each data set the best of
  those given. Of the paper's Table 2 at s = 16,384, REFRAG_16 less CEPE is
  0.0930: its "9.3 %".

  Args:
    none: float[data sets], log-perplexity without context.
    reached: float[data sets], of the model.
    *full: float[data sets] each, with the whole context.
  """
  none, reached = np.asarray(none, float), np.asarray(reached, float)
  best = np.min(np.asarray(full, float), axis=0)
  return float((none - reached).sum() / (none - best).sum())


def learning_rates(
  spec: Mapping[str, Any], records: Records
) -> list[tuple[str, tuple[float, ...], dict[float, list[str]]]]:
  """(stage, its grid, rate: the runs that trained with it), for all stages.

  A control takes the grid of its stage. The runs are those whose config.json
  is there and whose results have the stage.
  """
  grids, used = spec.get('learning_rates', {}), {}
  for run in records.runs.values():
    for stage in run.results.get('stages', {}):
      fields = run.config.get('stage', {}).get(stage)
      if fields:
        rates = used.setdefault(stage, {})
        rates.setdefault(fields['peak_learning_rate'], []).append(run.name)
  suffixes = ('_trained', '_frozen', '_unfrozen')

  def grid(stage: str) -> tuple[float, ...]:
    bases = [stage, *(stage.removesuffix(x) for x in suffixes)]
    return tuple(next((grids[b] for b in bases if b in grids), ()))

  return [(stage, grid(stage), rates) for stage, rates in used.items()]


# --- A claim and its parts ----------------------------------------------------


def _verdict(raw: Mapping[str, Any], bench: Bench) -> Verdict:
  where = f'claim {raw["number"]}'
  needs = read_needs(raw.get('needs', ()), bench.spec, where)
  tests = [
    read_test(test, bench.spec, bench.preset, where) for test in raw['test']
  ]
  parts = tuple(_part(test, (*needs, *test.needs), bench) for test in tests)
  verdict, why = _decide([part for part in parts if not part.test.also])
  names = dict.fromkeys(f.dataset for part in parts for f in part.findings)
  failed = {name: _failed(needs, bench, name) for name in names}
  return Verdict(
    number=raw['number'],
    title=raw['title'],
    sentence=raw['sentence'],
    paper=raw['paper'],
    verdict=verdict,
    why=why,
    parts=parts,
    failed={name: missed for name, missed in failed.items() if missed},
  )


def _decide(parts: Sequence[Part]) -> tuple[str, str]:
  """The verdict of a claim by those of its parts, and why in few words."""
  outcomes = {part.outcome for part in parts}
  verdicts = (CONTRARY, UNTESTABLE, UNDECIDED)
  verdict = next((v for v in verdicts if v in outcomes), CONFIRMED)
  if not parts:
    return UNTESTABLE, 'no test that decides'
  whys = {}
  for part in parts:
    if part.outcome == verdict or verdict == CONFIRMED:
      whys.setdefault(part.why, []).append(f'‘{part.test.says}’')
  if verdict == UNTESTABLE:  # what is missing says more than for what
    return verdict, '; '.join(whys)
  if verdict == CONFIRMED and len(whys) == 1:
    return verdict, f'{_tests(len(parts))} {"; ".join(whys)}'
  return verdict, '; '.join(
    f'{", ".join(of)} {why}' for why, of in whys.items()
  )


def _tests(number: int) -> str:
  return f'each of its {number} tests' if number > 1 else 'its test'


def _part(test: ClaimTest, needs: Sequence, bench: Bench) -> Part:
  """A test on each data set that has its cells, then over all of them."""
  margin, cells = None, test.cells
  if KINDS[test.kind].has_margin:
    none, full = test.gap
    size = bench.spec['statistics']['margin']
    margin = contrast({none: size, full: -size})
    cells = (*cells, none, full)
  cells = tuple(dict.fromkeys(cells))
  question = KINDS[test.kind].ask(test, margin)
  findings = tuple(
    _finding(question, cells, name, needs, bench)
    for name in records_lib.datasets(bench.records, cells)
  )
  lacking = _lacking(bench.records, cells)
  return Part(test, *_over_domains(findings, lacking, bench.domains), findings)


def _lacking(records: Records, cells: Sequence[str]) -> str:
  """What a test asks for and no run has: arms to be run, or else cells."""
  ran = {arm for _, arm in records.runs}
  arms, missed = {}, []
  for cell in records_lib.lacking(records, cells):
    arm = records_lib.split(cell)[0]
    if arm in ran:
      missed.append(cell)
    else:
      arms[f'`{arm}`'] = None
  whys = [f'not run yet: {", ".join(arms)}'] if arms else []
  whys += [f'there is no {", no ".join(missed)}'] if missed else []
  return ', '.join(whys)


def _over_domains(
  findings: Sequence[Finding], lacking: str, needed: int
) -> tuple[str, str]:
  """What a test says over all data sets, and why."""
  if lacking:
    return UNTESTABLE, lacking
  of = {}
  for f in findings:
    of.setdefault(f.outcome, []).append(f)
  names = {key: ', '.join(f.dataset for f in of[key]) for key in of}
  left = len(findings) - len(of.get(UNTESTABLE, ()))
  if left < needed:
    reasons = {}
    for f in of.get(UNTESTABLE, ()):
      reasons.setdefault(f.why, []).append(f.dataset)
    others = (f'{", ".join(on)} ({why})' for why, on in reasons.items())
    return UNTESTABLE, (
      f'{left} of {len(findings)} data sets are left and {needed} are needed; '
      f'not {", ".join(others)}'
    )
  if MEASURED in of:
    return MEASURED, f'on {names[MEASURED]}'
  for outcome, other in ((HOLDS, CONTRARY), (CONTRARY, HOLDS)):
    if len(of.get(outcome, ())) >= needed and other not in of:
      return outcome, f'{VERBS[outcome]} on {names[outcome]}'
  whys = [f'{VERBS[key]} on {names[key]}' for key in VERBS if key in of]
  whys += [f'on {f.dataset} {f.why}' for f in of.get(UNDECIDED, ())]
  return UNDECIDED, ', '.join(whys)


# --- A test on one data set ---------------------------------------------------


def _finding(
  question: Question,
  cells: Sequence[str],
  dataset: str,
  needs: Sequence,
  bench: Bench,
) -> Finding:
  rule = rule_of(bench.spec)
  of_seed = records_lib.by_seed(bench.records, cells, dataset)
  if not of_seed:
    why = 'no seed has all that is compared'
    return Finding(dataset, UNTESTABLE, why, None, {}, None)
  asked = [question.shown, *question.negative, *question.positive]
  asked += [question.margin] if question.margin else []
  _, value_NC = records_lib.over_seeds(of_seed)
  pooled = estimates(asked, cells, value_NC, rule)
  seeds = {
    seed: estimates(asked, cells, values_NC, rule)
    for seed, (_, values_NC) in of_seed.items()
  }
  outcome, why = _outcome(question, pooled, seeds, bench.seeds, rule)
  missed = _failed(needs, bench, dataset)
  if missed:
    outcome, why = UNTESTABLE, f'precondition {", ".join(missed)}'
  return Finding(
    dataset=dataset,
    outcome=outcome,
    why=why,
    pooled=pooled[0],
    seeds={seed: values[0] for seed, values in seeds.items()},
    margin=pooled[-1].mean if question.margin else None,
  )


def _outcome(
  question: Question,
  pooled: Sequence[Estimate],
  seeds: Mapping[int, Sequence[Estimate]],
  seeds_needed: int,
  rule: Rule,
) -> tuple[str, str]:
  """What the statements say, given those that must be positive.

  Args:
    pooled: of question.shown, .negative and .positive, in this order.
    seeds: the same for each seed.
  """
  first = 1 + len(question.negative)
  for gap in pooled[first : first + len(question.positive)]:
    if gap.sign(rule) != 1:
      return UNDECIDED, 'has no gap to take a share of'
  if not question.negative:
    return MEASURED, ''
  if len(seeds) < seeds_needed:
    there = ', '.join(map(str, seeds))
    return UNDECIDED, f'has {len(seeds)} of {seeds_needed} seeds ({there})'
  signs, whys = [], []
  for i in range(1, first):
    sign = pooled[i].sign(rule)
    of_seeds = [np.sign(of[i].mean or 0.0) for of in seeds.values()]
    if sign and any(other != sign for other in of_seeds):
      sign = 0
      whys.append('changes its sign from seed to seed')
    elif not sign:
      whys.append(_unsure(pooled[i], rule))
    signs.append(sign)
  if 1 in signs:
    return CONTRARY, ''
  return (UNDECIDED, whys[0]) if whys else (HOLDS, '')


def _unsure(value: Estimate, rule: Rule) -> str:
  """Why an estimate has no sign."""
  if value.mean is None or value.se is None:
    return f'has {value.n} document{"s" * (value.n != 1)} only'
  if abs(value.mean) <= rule.standard_errors * value.se:
    return f'is within {rule.standard_errors:g} standard errors'
  return 'has a bootstrap interval on both sides'


def _failed(needs: Iterable, bench: Bench, dataset: str) -> tuple[str, ...]:
  """The preconditions of `needs` that are not met on a data set, as yet."""
  missed = []
  for need in needs:
    names = [need] if isinstance(need, str) else need
    known = [bench.met[n].holds for n in names if bench.met[n].holds]
    if not any(holds.get(dataset, False) for holds in known):
      later = ' (not run yet)' if len(known) < len(names) else ''
      missed.append(' or '.join(names) + later)
  return tuple(missed)
