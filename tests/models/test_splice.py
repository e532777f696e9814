"""The layout: what stands at each decoder position, and where outputs are read.

Dimension key: B batch, Q prefix slots, C chunks, K chunk size, O output slots,
T decoder positions, D width, V vocabulary.
"""

import itertools

import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from refrag_jax.models import splice

BOS, QUESTION = 90, 91
# Ids that tell their own place: 100 + prefix slot, 1000 + 10 * chunk + offset,
# 2000 + output slot; a chunk's vector is called e0, e1, ...
PREFIX, CHUNK, OUTPUT = 100, 1000, 2000


build_layout = toy.jit(splice.build_layout, static_argnums=7)


def distinct(batch):
  """The same ragged rows with ids that tell where they come from."""
  slots = lambda name: np.indices(batch[name].shape, np.int32)
  _, chunk_BCK, offset_BCK = slots('chunks_BCK')
  return batch | {
    'prefix_BQ': PREFIX + slots('prefix_BQ')[1],
    'chunks_BCK': CHUNK + 10 * chunk_BCK + offset_BCK,
    'output_BO': OUTPUT + slots('output_BO')[1],
  }


def layout_of(batch, expand_BC, num_expanded):
  """build_layout on a batch, with the T that the model would take."""
  Q, O = batch['prefix_BQ'].shape[1], batch['output_BO'].shape[1]
  T = splice.num_positions(Q, *batch['chunks_BCK'].shape[1:], O, num_expanded)
  layout = build_layout(
    batch['prefix_BQ'],
    batch['prefix_len_B'],
    batch['chunks_BCK'],
    batch['chunk_len_BC'],
    expand_BC,
    batch['output_BO'],
    batch['output_len_B'],
    T,
  )
  return jax.tree.map(np.asarray, layout)


def as_written(layout, b):
  """Row b as a list: an id, or the name of the vector that stands there."""
  row = zip(layout.token_BT[b], layout.chunk_BT[b], layout.valid_BT[b])
  return [int(t) if c < 0 else f'e{c}' for t, c, valid in row if valid]


def by_hand(batch, expand_BC, b):
  """The same list from the paper's E(x, l), and where the output starts."""
  row = list(batch['prefix_BQ'][b, : batch['prefix_len_B'][b]])
  for i, length in enumerate(batch['chunk_len_BC'][b]):
    if length and expand_BC[b, i]:
      row += list(batch['chunks_BCK'][b, i, :length])
    elif length:
      row.append(f'e{i}')
  start = len(row)
  row += list(batch['output_BO'][b, : batch['output_len_B'][b]])
  return row, start


def test_the_picture_in_the_docstring():
  a, d, g, x = 1, 4, 7, 24  # abc def gh, xyz
  one = jnp.ones(1, jnp.int32)
  layout = build_layout(
    jnp.array([[BOS, QUESTION]]),
    2 * one,
    jnp.array([[[a, a + 1, a + 2], [d, d + 1, d + 2], [g, g + 1, 0]]]),
    jnp.array([[3, 3, 2]]),
    jnp.array([[False, True, False]]),
    jnp.array([[x, x + 1, x + 2]]),
    3 * one,
    splice.num_positions(2, 3, 3, 3, expanded=1),
  )
  z = 0  # a place that holds no token
  assert layout.token_BT.tolist() == [[90, 91, z, d, d + 1, d + 2, z, 24, 25]]
  assert layout.chunk_BT.tolist() == [[-1, -1, 0, -1, -1, -1, 2, -1, -1]]
  assert layout.valid_BT.all()
  # x, y and z are predicted from e_2, x and y.
  assert layout.output_BO.tolist() == [[6, 7, 8]]


@pytest.mark.parametrize('num_expanded', [0, 1, 3, 5])
def test_ragged_rows_with_random_masks_are_laid_out_in_place(num_expanded):
  batch = distinct(toy.batch(B=40, C=5))
  rng = np.random.default_rng(num_expanded)
  expand_BC = rng.random((40, 5)).argsort(1) < num_expanded
  layout = layout_of(batch, expand_BC, num_expanded)
  T = layout.token_BT.shape[1]
  for b in range(40):
    row, start = by_hand(batch, expand_BC, b)
    # A full row's last output is a target only, never an input.
    assert as_written(layout, b) == row[:T]
    assert len(row) <= T + 1
    for j in range(batch['output_len_B'][b]):
      assert layout.output_BO[b, j] == start + j - 1
    # What is padding holds nothing, and stands at the end.
    end = min(len(row), T)
    assert not layout.valid_BT[b, end:].any()
    assert (layout.token_BT[b, end:] == 0).all()
    assert (layout.chunk_BT[b, end:] == -1).all()


def test_absent_chunks_between_passages_take_no_position():
  batch = distinct(toy.batch(B=1, C=4))
  batch['chunk_len_BC'] = np.array([[3, 0, 0, 2]], np.int32)
  batch['prefix_len_B'][:], batch['output_len_B'][:] = 1, 2
  none_BC, all_BC = np.zeros((1, 4), bool), np.ones((1, 4), bool)
  folded = as_written(layout_of(batch, none_BC, 0), 0)
  assert folded == [100, 'e0', 'e3', 2000, 2001]
  unfolded = as_written(layout_of(batch, all_BC, 4), 0)
  assert unfolded == [100, 1000, 1001, 1002, 1030, 1031, 2000, 2001]


def test_every_position_gets_its_own_embedding_and_gradient():
  """Which vector lies where, and which chunk's vector moves which position."""
  batch = distinct(toy.batch(B=6, C=5))
  expand_BC = np.random.default_rng(1).random((6, 5)).argsort(1) < 2
  layout = layout_of(batch, expand_BC, 2)
  tokens_BT1 = layout.token_BT[..., None].astype(np.float32)
  chunks_BC1 = np.tile(-1 - np.arange(5, dtype=np.float32)[:, None], (6, 1, 1))
  fill = lambda chunks_BC1: splice.fill(layout, tokens_BT1, chunks_BC1)[..., 0]
  filled_BT = np.asarray(toy.jit(fill)(chunks_BC1))
  moved_BTBC = np.asarray(toy.jit(jax.jacobian(fill))(chunks_BC1)[..., 0])
  for b in range(6):
    row, _ = by_hand(batch, expand_BC, b)
    for t, what in enumerate(row[: filled_BT.shape[1]]):
      chunk = int(what[1:]) if isinstance(what, str) else None
      assert filled_BT[b, t] == (what if chunk is None else -1 - chunk)
      moved = [] if chunk is None else [[b, chunk]]
      assert np.argwhere(moved_BTBC[b, t]).tolist() == moved


def test_expanding_everything_is_the_plain_decoder_on_the_same_tokens():
  """Agreement 1; also with vectors at hand, which then nobody may see."""
  batch, params = toy.batch(B=4), toy.params()
  all_BC = np.ones((4, 4), bool)
  run = toy.jit(
    lambda params, c_BCE: forward.output_nll(
      toy.model(), params, batch, c_BCE, all_BC, 4
    )
  )
  nll_BO = run(params, None)
  np.testing.assert_allclose(run(params, np.ones((4, 4, 8))), nll_BO, atol=1e-5)
  lm, head_DV = toy.method('lm'), params['decoder']['lm_head']
  for b in range(4):
    before, output = toy.tokens_of_row(batch, b)
    T = 24  # right padding does not matter (test_decoder.py)
    ids_1T = np.zeros((1, T), np.int32)
    ids_1T[0, : len(before + output)] = before + output
    ones_1T = np.ones((1, T), np.int32)
    hidden_TD = lm(params, ids_1T, np.arange(T)[None], ones_1T)[0]
    logp_TV = jax.nn.log_softmax(hidden_TD @ head_DV)
    for j, target in enumerate(output):
      expected = -logp_TV[len(before) + j - 1, target]
      np.testing.assert_allclose(nll_BO[b, j], expected, rtol=1e-5)


@pytest.mark.parametrize(('q', 'L', 'k'), [(1, 8, 3), (7, 256, 16), (0, 1, 1)])
def test_expanding_nothing_takes_q_plus_l_positions(q, L, k):
  """Agreement 1: the prefill, whose last position predicts the one output."""
  assert splice.num_positions(q, L, k, 1, expanded=0) == q + L
  assert splice.num_positions(q, L, k, 1, expanded=L) == q + L * k


def test_one_compiled_layout_serves_every_choice_of_chunks():
  batch, traced = toy.batch(B=1), []

  @toy.jit
  def num_valid(expand_BC):
    traced.append(1)
    names = ('prefix_BQ', 'prefix_len_B', 'chunks_BCK', 'chunk_len_BC')
    arrays = [batch[name] for name in names]
    output = batch['output_BO'], batch['output_len_B']
    return splice.build_layout(*arrays, expand_BC, *output, 20).valid_BT.sum()

  for pair in itertools.combinations(range(4), 2):
    num_valid(np.isin(np.arange(4), pair)[None])
  assert len(traced) == 1
