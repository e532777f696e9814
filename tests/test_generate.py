"""Greedy generation is the argmax of the training loss's own logits.

Dimension key: B batch, C chunks, O forced output tokens, W new tokens, D width,
V vocabulary.
"""

import functools

import numpy as np
import pytest
import toy

from refrag_jax import generate
from refrag_jax.models import splice
from refrag_jax.models.refrag import Refrag

B, C, W = 5, 4, 6
NO_EOS = -1
EXPAND_BC = np.random.default_rng(0).random((B, C)).argsort(1) < 2


def prompts():
  """Ragged prompts: one forces nothing, one fills every slot there is."""
  batch = toy.batch(B, C, O=3)
  batch['output_len_B'][0] = 0
  for name, full in (
    ('prefix_len_B', 3),
    ('chunk_len_BC', toy.K),
    ('encoder_len_BC', toy.M),
    ('output_len_B', 3),
  ):
    batch[name][1] = full
  return batch


@functools.cache
def projected():
  """e_BCD of the prompts, made once: rows are cut from it."""
  batch, params = prompts(), toy.params()
  c_BCE = toy.method('encode')(
    params, batch['encoder_BCM'], batch['encoder_len_BC']
  )
  return np.asarray(toy.method('project')(params, c_BCE))


@functools.partial(toy.jit, static_argnames=('num_tokens', 'eos_id'))
def greedy(params, batch, e_BCD, expand_BC, num_tokens=W, eos_id=NO_EOS):
  return generate.greedy(
    toy.model(), params, batch, e_BCD, expand_BC, 2, num_tokens, eos_id
  )


@functools.cache
def batched():
  return np.asarray(greedy(toy.params(), prompts(), projected(), EXPAND_BC))


@toy.jit
def teacher_forced(params, batch, e_BCD, expand_BC):
  """Logits (B, O, V) that predict the outputs, by training's own path."""
  layout = splice.layout_of(batch, expand_BC, 2)
  hidden_BOD = toy.model().apply(
    {'params': params}, layout, e_BCD, method=Refrag.outputs
  )
  return hidden_BOD @ params['decoder']['lm_head']


def test_the_toy_model_has_something_to_say():
  """Constant answers would let the tests below pass for nothing."""
  assert len(set(map(tuple, batched()))) == B
  assert len(set(batched().flat)) > 10


def test_every_token_is_the_argmax_of_the_teacher_forced_logits():
  batch = prompts()
  length_B = batch['output_len_B']
  output_BO = np.zeros((B, 3 + W), np.int32)
  for b in range(B):
    forced = batch['output_BO'][b, : length_B[b]]
    row = np.concatenate([forced, batched()[b]])
    output_BO[b, : len(row)] = row
  batch |= {'output_BO': output_BO, 'output_len_B': length_B + W}
  logits_BOV = np.asarray(
    teacher_forced(toy.params(), batch, projected(), EXPAND_BC)
  )
  for b in range(B):
    new_WV = logits_BOV[b, length_B[b] : length_B[b] + W]
    np.testing.assert_array_equal(new_WV.argmax(-1), batched()[b])


def test_the_first_token_is_the_prefills():
  """Asked for one token after the context, with nothing forced."""
  batch = prompts() | {'output_len_B': np.zeros(B, np.int32)}
  args = batch, projected(), EXPAND_BC
  first_B1 = greedy(toy.params(), *args, num_tokens=1)
  logits_BOV = teacher_forced(toy.params(), *args)
  np.testing.assert_array_equal(first_B1[:, 0], logits_BOV[:, 0].argmax(-1))


@pytest.mark.parametrize('b', range(B))
def test_batched_ragged_requests_equal_one_at_a_time(b):
  """Agreement 5: no padding in the lone request, other shapes altogether."""
  batch = prompts()
  row = {name: value[b : b + 1] for name, value in batch.items()}
  row['prefix_BQ'] = row['prefix_BQ'][:, : batch['prefix_len_B'][b]]
  row['output_BO'] = row['output_BO'][:, : batch['output_len_B'][b]]
  present_C = np.flatnonzero(batch['chunk_len_BC'][b])
  for name in ('chunks_BCK', 'chunk_len_BC'):
    row[name] = row[name][:, present_C]
  alone_1W = greedy(
    toy.params(),
    row,
    projected()[b : b + 1, present_C],
    EXPAND_BC[b : b + 1, present_C],
  )
  np.testing.assert_array_equal(alone_1W[0], batched()[b])


def test_without_vectors_every_chunk_is_read_as_tokens():
  batch, params = prompts(), toy.params()
  all_BC = np.ones((B, C), bool)
  run = toy.jit(
    lambda e_BCD: generate.greedy(
      toy.model(), params, batch, e_BCD, all_BC, C, W, NO_EOS
    )
  )
  np.testing.assert_array_equal(run(None), run(projected()))


def test_a_row_stops_at_its_end_and_the_others_go_on():
  eos_id = int(batched()[0, 2])
  tokens_BW = greedy(
    toy.params(), prompts(), projected(), EXPAND_BC, eos_id=eos_id
  )
  for row, free_row in zip(np.asarray(tokens_BW), batched()):
    ended = np.cumsum(free_row == eos_id) > 0
    np.testing.assert_array_equal(row, np.where(ended, eos_id, free_row))
