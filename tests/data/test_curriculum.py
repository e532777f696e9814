"""The curriculum against the paper's Table 8, and scaled to other budgets."""

import numpy as np
import pytest

from refrag_jax.data import curriculum
from refrag_jax.errors import UserError

# Table 8 of the paper; a row per number of chunks, a column per stage.
TABLE8 = {
  1: [1333, 445, 148, 49, 16, 6, 2, 1, 0],
  2: [333, 298, 267, 238, 213, 191, 171, 153, 137],
  4: [83, 102, 126, 156, 193, 238, 293, 362, 447],
  8: [20, 35, 61, 106, 185, 324, 565, 985, 1719],
  16: [5, 11, 23, 48, 103, 220, 468, 997, 2125],
  32: [1, 3, 7, 19, 50, 133, 353, 939, 2496],
  64: [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
  128: [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
  256: [1, 3, 9, 25, 73, 212, 618, 1802, 5259],
}


def test_the_rule_gives_all_81_cells():
  cells = curriculum.weights(list(TABLE8))
  assert cells.shape == (9, 9)
  for i, row in enumerate(TABLE8.values()):
    assert cells[:, i].tolist() == row
  assert cells.sum() == 42008


@pytest.mark.parametrize('num_steps', [42008, 9000, 100, 7, 1, 0])
@pytest.mark.parametrize('factors', [(1, 2, 4, 8), (2, 16), tuple(TABLE8)])
def test_schedule_keeps_the_proportions(num_steps, factors):
  steps = curriculum.schedule(num_steps, factors, seed=3)
  assert steps.dtype == np.int32
  assert steps.shape == (num_steps,)
  cells = curriculum.weights(factors)
  total = cells.sum(axis=1)
  length = curriculum.counts(num_steps, factors).sum(axis=1)
  assert np.abs(length - num_steps * total / total.sum()).max() < 1
  for stage, part in enumerate(np.split(steps, np.cumsum(length)[:-1])):
    for i, factor in enumerate(factors):
      want = len(part) * cells[stage, i] / total[stage]
      assert abs((part == factor).sum() - want) < 1


def test_full_budget_is_table_8_itself():
  want = np.asarray(list(TABLE8.values())).T
  np.testing.assert_array_equal(curriculum.counts(42008, tuple(TABLE8)), want)


def test_schedule_is_shuffled_within_stages_by_the_seed():
  factors = (1, 2, 4, 8)
  first = curriculum.schedule(500, factors, seed=0)
  np.testing.assert_array_equal(first, curriculum.schedule(500, factors, 0))
  second = curriculum.schedule(500, factors, seed=1)
  assert (first != second).any()
  ends = np.cumsum(curriculum.counts(500, factors).sum(axis=1))
  for a, b in zip(
    np.split(first, ends[:-1]), np.split(second, ends[:-1]), strict=True
  ):
    np.testing.assert_array_equal(np.sort(a), np.sort(b))
  assert (np.diff(first[-100:]) < 0).any()  # not from short to long


def test_one_factor_is_no_curriculum():
  assert (curriculum.schedule(10, (12,), seed=0) == 12).all()


def test_unknown_factors():
  with pytest.raises(UserError, match='factor 3 is not in Table 8'):
    curriculum.schedule(10, (1, 3), seed=0)
  for factors in ((), (2, 1), (2, 2)):
    with pytest.raises(UserError, match='ascending'):
      curriculum.schedule(10, factors, seed=0)


def test_table_and_plot(tmp_path):
  table = curriculum.table(100, (1, 2, 4), chunk_size=8)
  assert table.row_count == 4
  assert list(table.columns[0].cells) == ['1 x 8', '2 x 8', '4 x 8', 'all']
  assert list(table.columns[-1].cells)[-1] == '100'
  path = tmp_path / 'curriculum.svg'
  svg = curriculum.plot(100, (1, 2, 4), 8, str(path))
  assert svg == path.read_text()
  assert svg.lstrip().startswith('<?xml')
  assert svg == curriculum.plot(100, (1, 2, 4), 8)
