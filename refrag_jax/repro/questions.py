"""The tests of configs/claims.toml: read, checked, and made into statements.

A test becomes a `Question`: statistics of cells that must be surely negative
for it to hold. What the kinds of tests mean is said in that file.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from refrag_jax.errors import UserError
from refrag_jax.repro import records as records_lib
from refrag_jax.repro.estimate import (
  Rule,
  Statistic,
  contrast,
  plus,
  share,
  slope,
)
from refrag_jax.repro.records import Records


class ClaimTest(NamedTuple):
  """A part-test, as [[claim.test]] has it."""

  says: str
  kind: str  # of KINDS
  cells: tuple[str, ...]
  also: bool  # reported, decides nothing
  over: tuple[float, ...]  # of 'rises' and 'falls': what the cells stand over
  by: float  # of 'lower': by at least so much
  above: float | None  # of 'share'
  below: float | None
  gap: tuple[str, str]  # without and with: what a margin is a share of
  needs: tuple  # preconditions beside the claim's
  unit: str


class Question(NamedTuple):
  """A test as statements about means over documents."""

  shown: Statistic  # what is reported
  negative: tuple[Statistic, ...]  # the test holds if all of these are
  positive: tuple[Statistic, ...]  # must be: what is divided by
  margin: Statistic | None


def rule_of(spec: Mapping[str, Any]) -> Rule:
  """How sure is sure enough, of [statistics]."""
  values = spec['statistics']
  return Rule(**{field: values[field] for field in Rule._fields})


def preset_of(spec: Mapping[str, Any], records: Records) -> dict[str, Any]:
  """What the cells have in braces, for the config of these runs.

  Raises:
    UserError: the file has no preset for it.
  """
  presets = spec.get('preset', {})
  if records.config in presets:
    return presets[records.config]
  if not records.config:  # nothing has run: any will do to say so
    return next(iter(presets.values()), {})
  if not spec.get('claim') and not spec.get('table'):
    return {}
  raise UserError(
    f'the claims file has no [preset.{records.config}] for the config of these '
    f'runs (it has {", ".join(presets) or "none"}): copy one and set its values'
  )


def read_test(
  raw: Mapping, spec: Mapping, preset: Mapping, where: str
) -> ClaimTest:
  """Checks a [[...test]] table whose braces are filled.

  Raises:
    UserError: a key, the kind, the number of cells or a precondition is none.
  """
  where = f'{where} of the claims file'
  known = {'test', *ClaimTest._fields} - {'kind'}
  unknown = set(raw) - known
  if unknown:
    raise UserError(f'{where}: a test has no {", ".join(sorted(unknown))}')
  if raw.get('test') not in KINDS:
    raise UserError(
      f'{where}: there is no test {raw.get("test")!r}; there are '
      f'{", ".join(KINDS)}'
    )
  over = tuple(float(value) for value in raw.get('over', ()))
  wanted = KINDS[raw['test']].num_cells or len(over)
  cells = tuple(raw['cells'])
  if len(cells) != wanted or len(cells) < 2:
    raise UserError(
      f'{where}: {raw["test"]} takes {wanted or "two or more"} cells, not '
      f'{len(cells)}'
    )
  gap = raw.get('gap') or filled(spec['statistics'].get('gap', ()), preset)
  for cell in (*cells, *gap):
    records_lib.split(cell)
  test = ClaimTest(
    says='', kind=raw['test'], cells=cells, also=raw.get('also', False),
    over=over, by=raw.get('by', 0.0), above=raw.get('above'),
    below=raw.get('below'), gap=tuple(gap),
    needs=read_needs(raw.get('needs', ()), spec, where),
    unit=raw.get('unit', 'nats per token'),
  )  # fmt: skip
  return test._replace(says=raw.get('says') or formula(test))


def read_needs(needs: Iterable, spec: Mapping, where: str) -> tuple:
  """Checks that all preconditions named are there; a list is an either-or.

  Raises:
    UserError: one of them is missing.
  """
  for need in needs:
    for name in [need] if isinstance(need, str) else need:
      if name not in spec.get('precondition', {}):
        raise UserError(
          f'{where} needs {name!r}, and there is no [precondition.{name}]'
        )
  return tuple(needs)


def filled(value: Any, preset: Mapping[str, Any]) -> Any:
  """The value with what stands in braces, in all strings within.

  Raises:
    UserError: the preset has no value of a name in braces.
  """
  if isinstance(value, str):
    try:
      return value.format_map(preset)
    except (KeyError, IndexError, ValueError) as e:
      raise UserError(
        f'the claims file has {value!r}, and the preset of these runs no {e}'
      ) from None
  if isinstance(value, Mapping):
    return {key: filled(inner, preset) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [filled(inner, preset) for inner in value]
  return value


# --- Kinds of tests -----------------------------------------------------------
# Each makes a Question of a test and its margin (None where `gap` has no use).


def _difference(a: str, b: str) -> Statistic:
  return contrast({a: 1.0, b: -1.0})


def _lower(test: ClaimTest, margin: Statistic) -> Question:
  a, b = test.cells
  shown = _difference(a, b)
  return Question(shown, (shown._replace(constant=test.by),), (), None)


def _little(test: ClaimTest, margin: Statistic) -> Question:
  shown = _difference(*test.cells)
  below = plus(shown, margin.negative())
  return Question(shown, (below,), (margin,), margin)


def _about(test: ClaimTest, margin: Statistic) -> Question:
  shown, none = _difference(*test.cells), margin.negative()
  both = plus(shown, none), plus(shown.negative(), none)
  return Question(shown, both, (margin,), margin)


def _rises(test: ClaimTest, margin: Statistic) -> Question:
  shown = slope(test.cells, np.log2(test.over).tolist())
  return Question(shown, (shown.negative(),), (), None)


def _falls(test: ClaimTest, margin: Statistic) -> Question:
  shown = slope(test.cells, np.log2(test.over).tolist())
  return Question(shown, (shown,), (), None)


def _wider(test: ClaimTest, margin: Statistic) -> Question:
  a, b, c, d = test.cells
  shown = plus(_difference(a, b), _difference(d, c))
  return Question(shown, (shown,), (), None)


def _share(test: ClaimTest, margin: Statistic) -> Question:
  start, reached, end = test.cells
  shown = share(start, reached, end)
  negative = ()
  if test.below is not None:
    negative += (shown._replace(constant=-test.below),)
  if test.above is not None:
    negative += (shown.negative()._replace(constant=test.above),)
  return Question(shown, negative, (_difference(start, end),), None)


def _larger_share(test: ClaimTest, margin: Statistic) -> Question:
  (start, _, end), (other_start, _, other_end) = test.cells[:3], test.cells[3:]
  shown = plus(share(*test.cells[:3]), share(*test.cells[3:]).negative())
  gaps = _difference(start, end), _difference(other_start, other_end)
  return Question(shown, (shown.negative(),), gaps, None)


class Kind(NamedTuple):
  ask: Callable[[ClaimTest, Statistic], Question]
  num_cells: int  # 0: as many as `over` has
  has_margin: bool
  formula: str  # the cells are {0}, {1}, ...


KINDS = {
  'lower': Kind(_lower, 2, False, '{0} < {1}'),
  'little': Kind(_little, 2, True, '{0} < {1} + margin'),
  'about': Kind(_about, 2, True, '{0} within the margin of {1}'),
  'rises': Kind(_rises, 0, False, 'slope over log2 above 0: {all}'),
  'falls': Kind(_falls, 0, False, 'slope over log2 below 0: {all}'),
  'wider': Kind(_wider, 4, False, '{0} − {1} < {2} − {3}'),
  'share': Kind(_share, 3, False, '({0} − {1}) / ({0} − {2})'),
  'larger_share': Kind(
    _larger_share, 6, False,
    '({0} − {1}) / ({0} − {2}) > ({3} − {4}) / ({3} − {5})',
  ),
}  # fmt: skip


def formula(test: ClaimTest, quote: str = '`') -> str:
  """A test in terms of its cells."""
  cells = [f'{quote}{cell}{quote}' for cell in test.cells]
  text = KINDS[test.kind].formula.format(*cells, all=', '.join(cells))
  if test.by:
    text += f' − {test.by:g}'
  if test.above is not None:
    text += f' > {test.above:g}'
  if test.below is not None:
    text += f' < {test.below:g}'
  return text
