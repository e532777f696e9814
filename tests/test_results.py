"""Standard errors by hand, and files that are whole or absent."""

import json
import os

import numpy as np
import pytest

from refrag_jax import results
from refrag_jax.errors import UserError
from refrag_jax.runtime import files


def test_stat_by_hand():
  # mean 2, squared deviations 1 + 0 + 1 = 2, variance 2 / (3 - 1) = 1.
  value = results.stat(np.array([1.0, 2.0, 3.0]))
  assert value['mean'] == 2.0 and value['n'] == 3
  assert value['se'] == pytest.approx(1 / np.sqrt(3))


def test_one_document_has_no_standard_error():
  assert results.stat(np.array([5.0])) == {'mean': 5.0, 'se': None, 'n': 1}
  assert results.stat(np.array([])) == {'mean': None, 'se': None, 'n': 0}


def test_documents_are_the_unit():
  """Ten windows of one document weigh as much as one of another."""
  values_W = np.array([4.0, *[0.0, 2.0] * 5])
  doc_W = np.array([7, *[3] * 10])
  mean_N = results.by_document(values_W, doc_W)
  np.testing.assert_array_equal(mean_N, [1.0, 4.0])  # documents 3 and 7
  right = results.stat(mean_N)
  assert right['mean'] == 2.5 and right['n'] == 2
  assert right['se'] == pytest.approx(1.5)
  # Over windows it would be another mean and a far smaller error.
  wrong = results.stat(values_W)
  assert wrong['mean'] != 2.5 and wrong['se'] < 0.5


def test_by_document_ignores_the_order_of_windows():
  rng = np.random.default_rng(0)
  values_W, doc_W = rng.normal(size=50), rng.integers(0, 9, 50)
  order = rng.permutation(50)
  np.testing.assert_allclose(
    results.by_document(values_W, doc_W),
    results.by_document(values_W[order], doc_W[order]),
  )
  with pytest.raises(ValueError, match='one document a value'):
    results.by_document(values_W, doc_W[:-1])


def test_paired_removes_what_documents_share():
  a_N, b_N = np.array([1.0, 5.0, 9.0]), np.array([2.0, 6.0, 10.5])
  value = results.paired(a_N, b_N)  # -1, -1, -1.5
  assert value['mean'] == pytest.approx(-3.5 / 3)
  assert value['se'] == pytest.approx(np.sqrt(1 / 12) / np.sqrt(3))
  assert value['se'] < results.stat(a_N)['se'] / 10
  with pytest.raises(ValueError, match='same documents'):
    results.paired(a_N, b_N[:1])


@pytest.mark.parametrize(
  ('mean', 'se', 'expected'),
  [(0.31, 0.1, True), (-0.31, 0.1, True), (0.29, 0.1, False),
   (9.0, None, False), (None, None, False)],
)  # fmt: skip
def test_significant_is_three_standard_errors(mean, se, expected):
  assert results.significant({'mean': mean, 'se': se}) is expected


def test_json_round_trip_of_numpy_and_nan(tmp_path):
  path = tmp_path / 'deep' / 'results.json'
  value = {'a': np.float32(0.5), 'b': np.arange(2), 'c': float('nan'), 1: True}
  files.write_json(path, value)
  expected = {'a': 0.5, 'b': [0, 1], 'c': None, '1': True}
  assert files.read_json(path) == expected
  assert os.listdir(path.parent) == ['results.json']


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'results.json'
  files.write_json(path, {'old': 1})

  def full_disk(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space'):
    files.write_json(path, {'new': 2})
  assert files.read_json(path) == {'old': 1}
  assert os.listdir(tmp_path) == ['results.json']


def test_broken_json_is_named(tmp_path):
  (tmp_path / 'results.json').write_text('{"a": ')
  with pytest.raises(UserError, match='is not JSON'):
    files.read_json(tmp_path / 'results.json')


def test_read_lines_skips_a_torn_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert files.read_lines(path) == []
  path.write_text(json.dumps({'step': 1}) + '\n' + '{"step": 2, "lo')
  assert files.read_lines(path) == [{'step': 1}]
