"""Windows, packed rows, repeated spans, and the order they come in."""

import json

import numpy as np
import pytest

from refrag_jax.data import packing, tokenizers, windows
from refrag_jax.data.text import corpus
from refrag_jax.errors import UserError

BYTES = tokenizers.load('bytes')
BOS, PAD = BYTES.bos_id, BYTES.pad_id
LENGTHS = [3, 40, 11, 10, 25, 9, 64, 12, 12, 1]


@pytest.fixture
def made(tmp_path):
  """Documents of known lengths; no two places hold the same five bytes."""
  rng = np.random.default_rng(0)
  texts = [''.join(chr(c) for c in rng.integers(33, 127, n)) for n in LENGTHS]
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(json.dumps({'text': t}) for t in texts))
  return corpus.prepare([str(path)], [1.0], BYTES, str(tmp_path / 'cache'), 0.0)


ALL = np.arange(len(LENGTHS))


@pytest.mark.parametrize(('s', 'o'), [(8, 2), (0, 8), (4, 4), (2, 9)])
def test_windows_never_repeat_a_target(made, s, o):
  table = windows.windows(made, ALL, s, o)
  doc, start = windows.locate(table, np.arange(table.num))
  targets = [(d, a + s + i) for d, a in zip(doc, start, strict=True)
             for i in range(o)]  # fmt: skip
  assert len(set(targets)) == len(targets)
  assert all(end < LENGTHS[d] for d, end in targets)
  for d, n in enumerate(LENGTHS):
    # As many as fit: what is left is too short for one more.
    count = (doc == d).sum()
    assert count == max(0, (n - s) // o)
    assert sorted(start[doc == d]) == [o * w for w in range(count)]
  assert table.short == sum(n < s + o for n in LENGTHS)


def test_no_document_is_long_enough(made):
  with pytest.raises(
    UserError, match=r'none of the 10 held-out .*60 \+ 8 = 68 .*longest has 64'
  ):
    windows.windows(made, ALL, 60, 8, 'held-out documents')
  with pytest.raises(UserError, match='none of the 0 documents'):
    windows.windows(made, ALL[:0], 1, 1)


@pytest.mark.parametrize('num', [1, 4, 9, 20, 1000])
def test_spread_takes_turns_over_documents(made, num):
  table = windows.windows(made, ALL, 4, 4)
  picked = windows.spread(table, num, seed=0)
  assert len(picked) == len(set(picked.tolist())) == min(num, table.num)
  doc, _ = windows.locate(table, picked)
  count = np.bincount(doc, minlength=len(ALL))[table.docs]
  # Nobody has a second turn while somebody with windows left has had none.
  left = np.diff(table.bounds) - count
  assert (count[left > 0] >= count.max() - 1).all()
  np.testing.assert_array_equal(picked, windows.spread(table, num, seed=0))
  assert num < 4 or (
    len(windows.spread(table, num, 1)) != len(picked)
    or (windows.spread(table, num, 1) != picked).any()
  )


@pytest.mark.parametrize('size', [1, 2, 3, 5, 16, 17, 1000, 70_000])
def test_permute_is_a_permutation(size):
  n = np.arange(size)
  out = windows.permute(n, size, 7, 0)
  np.testing.assert_array_equal(np.sort(out), n)
  # Random access: any part alone, in any order.
  np.testing.assert_array_equal(out[::-2], windows.permute(n[::-2], size, 7, 0))
  if size >= 1000:
    assert abs(np.corrcoef(n, out)[0, 1]) < 0.1
    other = windows.permute(n, size, 8, 0)
    assert (out == other).mean() < 0.01
    assert (np.diff(out) == 1).mean() < 0.01


def test_permute_with_keys_per_element():
  n = np.arange(50)
  both = windows.permute(np.concatenate([n, n]), 50, 3, np.repeat([4, 5], 50))
  for i, key in enumerate((4, 5)):
    np.testing.assert_array_equal(
      both[50 * i : 50 * (i + 1)], windows.permute(n, 50, 3, key)
    )


def test_mixture_keeps_its_weights_at_all_times():
  weights = [5.0, 3.0, 2.0]
  pattern = windows.mixture(weights)
  n = np.arange(5000)
  source, _ = windows.draw(pattern, [7, 100, 31], n, seed=0)
  for i, weight in enumerate(weights):
    count = np.cumsum(source == i)
    assert np.abs(count - (n + 1) * weight / 10).max() < 4
  assert windows.mixture([2.0]).sources.tolist() == [0]
  assert (windows.mixture([1.0, 1e-9]).sources == 1).sum() == 1


def test_every_source_is_gone_through_in_epochs():
  pattern, sizes = windows.mixture([3.0, 1.0]), [50, 7]
  n = np.arange(2000)
  source, sample = windows.draw(pattern, sizes, n, seed=1)
  for i, size in enumerate(sizes):
    mine = sample[source == i]
    epochs = mine[: len(mine) // size * size].reshape(-1, size)
    np.testing.assert_array_equal(
      np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1))
    )
    assert (epochs[0] != epochs[1]).any()
  # Slot n alone gives what the whole stream gives.
  some = n[[1999, 3, 700]]
  for got, want in zip(
    windows.draw(pattern, sizes, some, seed=1), (source, sample), strict=True
  ):
    np.testing.assert_array_equal(got, want[some])


@pytest.mark.parametrize('length', [2, 5, 16, 200])
def test_packed_rows_hold_every_token_once(made, length):
  table = packing.pack(made, ALL, length)
  rows = packing.fill_rows(made, table, np.arange(table.num), BOS, PAD)
  tokens, segments = rows['tokens_BT'], rows['segment_ids_BT']
  assert tokens.shape == (table.num, length)
  pieces = []
  for row, segment, position, doc in zip(
    tokens, segments, rows['positions_BT'], rows['doc_B'], strict=True
  ):
    assert (row[segment == 0] == PAD).all()
    assert (np.diff(segment[segment > 0]) >= 0).all()
    assert (segment[(segment > 0).sum() :] == 0).all()  # padding comes last
    for number in range(1, segment.max() + 1):
      piece = row[segment == number]
      assert piece[0] == BOS
      assert BOS not in piece[1:]
      np.testing.assert_array_equal(
        position[segment == number], np.arange(len(piece))
      )
      pieces.append(bytes(piece[1:].tolist()).decode())
    assert pieces[-segment.max()] in made.document_text(doc)
  want = []
  for d, n in enumerate(LENGTHS):
    t = made.document_text(d)
    want += [t[i : i + length - 1] for i in range(0, n, length - 1)]
  assert sorted(pieces) == sorted(want)


def test_no_two_packed_rows_fit_into_one(made):
  table = packing.pack(made, ALL, 16)
  used = np.add.reduceat(table.size + 1, table.bounds[:-1])
  assert (used <= 16).all()
  assert np.sort(used)[:2].sum() > 16
  assert (np.diff(table.bounds) > 1).any()


def test_periodic_rows(made):
  length = 130
  table = packing.pack(made, ALL, length)
  key = np.arange(400)
  rows = packing.periodic_rows(made, table, key, BOS, seed=0)
  tokens = rows['tokens_BT']
  assert (tokens[:, 0] == BOS).all()
  assert (tokens[:, 1:] < 256).all()
  assert (rows['segment_ids_BT'] == 1).all()
  assert (rows['positions_BT'] == np.arange(length)).all()
  texts = [made.document_text(d) for d in ALL]
  periods, real = [], 0
  for row, doc in zip(tokens[:, 1:], rows['doc_B'], strict=True):
    period = next(p for p in range(1, 60) if (row[p:] == row[:-p]).all())
    periods.append(period)
    real += bytes(row[:period].tolist()).decode() in texts[doc]
  low, high = packing.PERIODS
  # A document shorter than its period repeats its last token: still periodic.
  assert max(periods) == high
  assert np.mean([low <= p for p in periods]) > 0.95
  assert 120 < real < 220  # of 400; half, but for the shortest documents
  again = packing.periodic_rows(made, table, key[[7, 3]], BOS, seed=0)
  np.testing.assert_array_equal(again['tokens_BT'], tokens[[7, 3]])
  other = packing.periodic_rows(made, table, key, BOS, seed=1)
  assert (other['tokens_BT'] != tokens).any(axis=1).mean() > 0.9


@pytest.mark.parametrize('fraction', [0.0, 0.4, 0.3, 1.0])
def test_periodic_share_is_exact_and_spread(fraction):
  row = np.arange(40)
  periodic = packing.is_periodic(row, fraction)
  assert periodic.sum() == round(40 * fraction)
  np.testing.assert_array_equal(
    packing.periodic_before(row, fraction), np.cumsum(periodic) - periodic
  )
  for part in np.split(periodic, 4):
    assert abs(part.sum() - 10 * fraction) < 1


def test_passes_are_those_of_the_source_that_repeats_most():
  assert windows.passes([1, 1], [10, 100], 40) == 2.0
  assert windows.passes([1, 3], [10, 10], 40) == 3.0
