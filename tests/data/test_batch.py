"""The batch's definition is that of the batches; cuts touch what they name."""

import numpy as np
import pytest
import toy_run

from refrag_jax.data import batch
from refrag_jax.stages import STAGES


@pytest.fixture(scope='module')
def windows():
  rng = np.random.default_rng(0)
  sizes = dict(Q=1, C=4, K=3, M=5, P=2, O=6)
  shapes = batch.shapes(
    [f for f in batch.FIELDS if set(batch.axes(f)) <= {'B', *sizes}], **sizes
  )
  return {
    field: rng.integers(2, size=(7, *shape)).astype(dtype)
    for field, (shape, dtype) in shapes.items()
  }


@pytest.mark.parametrize('name', STAGES)
def test_every_field_of_a_task_is_defined(name):
  cfg = toy_run.config('', model__piece_length=4)
  shapes = STAGES[name].task.row_shapes(cfg, name, 2)
  for field, (shape, dtype) in shapes.items():
    assert dtype == batch.FIELDS[field].dtype
    assert len(shape) == len(batch.axes(field)) - 1


def test_contexts_change_and_nothing_else_does(windows):
  turned = batch.with_contexts_of(windows, np.roll(np.arange(7), 1))
  for field, values in windows.items():
    context = batch.axes(field)[1:2] in ('C', 'P')
    want = np.roll(values, 1, axis=0) if context else values
    np.testing.assert_array_equal(turned[field], want, err_msg=field)


def test_a_cut_leaves_chunks_and_outputs_that_were_asked_for(windows):
  cut = batch.cut_outputs(batch.cut_chunks(windows, slice(-3, None)), 4)
  assert not {'piece_BPM', 'piece_len_BP'} & cut.keys()
  np.testing.assert_array_equal(
    cut['encoder_BCM'], windows['encoder_BCM'][:, 1:]
  )
  assert cut['loss_mask_BO'].shape == cut['output_BO'].shape == (7, 4)
  assert (cut['output_len_B'] == 4).all()
  np.testing.assert_array_equal(cut['prefix_BQ'], windows['prefix_BQ'])


def test_contexts_stand_side_by_side(windows):
  rows_BX = np.stack([np.arange(7), (np.arange(7) + 2) % 7], axis=1)
  joined = batch.side_by_side(windows, rows_BX)
  assert joined['chunks_BCK'].shape == (7, 8, 3)
  np.testing.assert_array_equal(
    joined['chunks_BCK'][0, 4:], windows['chunks_BCK'][2]
  )
  np.testing.assert_array_equal(joined['output_BO'], windows['output_BO'])


def test_parts_are_joined_by_their_rows():
  mask = np.array([True, False, True])
  part = lambda value, n: {'doc_B': np.full(n, value, np.int32)}
  joined = batch.join(3, [(mask, part(1, 2)), (~mask, part(2, 1))])
  assert joined['doc_B'].tolist() == [1, 2, 1]
