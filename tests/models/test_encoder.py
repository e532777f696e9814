"""The chunk encoder: a chunk's vector is a function of its own tokens alone.

Dimension key: B batch, C chunks, M encoder tokens of a chunk, E width, X chunks
folded.
"""

import math

import bert_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from refrag_jax.models import layers

CFG = toy.MODEL.encoder
POOLINGS = ('cls', 'mean')


def encode(batch, pooling='cls'):
  """c_BCE of toy parameters, which do not depend on the pooling."""
  run = toy.method('encode', toy.replace('encoder', pooling=pooling))
  return np.asarray(
    run(toy.params(), batch['encoder_BCM'], batch['encoder_len_BC'])
  )


def vectors_by_hand(params, ids, pooling):
  states_ME = bert_by_hand.states(params, ids)
  return states_ME[0] if pooling == 'cls' else states_ME.mean(0)


@pytest.mark.parametrize('pooling', POOLINGS)
def test_vectors_are_those_of_a_bert_written_by_hand(pooling):
  batch = toy.batch(B=3)
  c_BCE = encode(batch, pooling)
  for b, i in np.argwhere(batch['encoder_len_BC'] > 0):
    ids = batch['encoder_BCM'][b, i, : batch['encoder_len_BC'][b, i]]
    expected_E = vectors_by_hand(toy.params()['encoder'], ids, pooling)
    np.testing.assert_allclose(c_BCE[b, i], expected_E, atol=1e-5)


def test_states_are_those_of_a_bert_written_by_hand():
  batch = toy.batch(B=3)
  ids_XM = batch['encoder_BCM'].reshape(-1, toy.M)
  len_X = batch['encoder_len_BC'].reshape(-1)
  states_XME = toy.method('encoder_states')(toy.params(), ids_XM, len_X)
  assert states_XME.shape == (12, toy.M, CFG.width)
  for x in np.flatnonzero(len_X):
    expected_ME = bert_by_hand.states(
      toy.params()['encoder'], ids_XM[x, : len_X[x]]
    )
    np.testing.assert_allclose(
      states_XME[x, : len_X[x]], expected_ME, atol=1e-5
    )


@pytest.mark.parametrize('pooling', POOLINGS)
def test_padding_is_masked(pooling):
  """Agreement 3: the ids behind a short chunk's tokens are read by nobody."""
  batch = toy.batch(B=3)
  is_padding = np.arange(toy.M) >= batch['encoder_len_BC'][..., None]
  assert is_padding[batch['encoder_len_BC'] > 0].any()
  other = batch | {'encoder_BCM': np.where(is_padding, 7, batch['encoder_BCM'])}
  present = batch['encoder_len_BC'] > 0
  c_BCE, other_BCE = encode(batch, pooling), encode(other, pooling)
  np.testing.assert_array_equal(c_BCE[present], other_BCE[present])


def test_more_padding_changes_nothing():
  batch = toy.batch(B=2)
  wider_BCM = np.pad(batch['encoder_BCM'], ((0, 0), (0, 0), (0, 1)))
  present = batch['encoder_len_BC'] > 0
  wider_BCE = encode(batch | {'encoder_BCM': wider_BCM})
  np.testing.assert_allclose(
    wider_BCE[present], encode(batch)[present], atol=1e-5
  )


@pytest.mark.parametrize('pooling', POOLINGS)
def test_a_vector_depends_on_its_chunk_alone(pooling):
  """Agreement 2: not on neighbours, on its passage's rank, or on the batch."""
  batch = toy.batch(B=3, C=4)
  c_BCE = encode(batch, pooling)
  rng = np.random.default_rng(1)
  order_X = rng.permutation(12)
  shuffled = {
    name: batch[name].reshape(12, -1)[order_X].reshape(batch[name].shape)
    for name in ('encoder_BCM', 'encoder_len_BC')
  }
  shuffled_XE = encode(shuffled, pooling).reshape(12, -1)
  np.testing.assert_allclose(
    shuffled_XE, c_BCE.reshape(12, -1)[order_X], atol=1e-5
  )
  # Alone, as a store of vectors would have encoded it.
  for b, i in np.argwhere(batch['encoder_len_BC'] > 0)[:2]:
    alone = {
      name: batch[name][b : b + 1, i : i + 1]
      for name in ('encoder_BCM', 'encoder_len_BC')
    }
    np.testing.assert_allclose(
      encode(alone, pooling)[0, 0], c_BCE[b, i], atol=1e-5
    )


@pytest.mark.parametrize('pooling', POOLINGS)
def test_an_absent_chunk_is_finite_in_value_and_gradient(pooling):
  run = toy.method('encode', toy.replace('encoder', pooling=pooling))
  ids_11M, zero_11 = np.zeros((1, 1, toy.M), int), np.zeros((1, 1), int)
  value, grads = toy.jit(
    jax.value_and_grad(lambda params: run(params, ids_11M, zero_11).sum())
  )(toy.params())
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize(
  ('dtype', 'near'), [('float32', 2e-6), ('bfloat16', 2e-2)]
)
def test_gelu_is_the_exact_one(dtype, near):
  x_N = np.linspace(-8, 8, 4001).astype(dtype)
  exact_N = x_N.astype(np.float64)
  below_N = np.vectorize(math.erfc)(-exact_N / math.sqrt(2)) / 2
  density_N = np.exp(-(exact_N**2) / 2) / math.sqrt(2 * math.pi)
  got_N, back = jax.vjp(layers.gelu, jnp.asarray(x_N))
  (slope_N,) = back(jnp.ones_like(got_N))
  assert got_N.dtype == slope_N.dtype == x_N.dtype
  np.testing.assert_allclose(got_N.astype(float), exact_N * below_N, atol=near)
  np.testing.assert_allclose(
    slope_N.astype(float), below_N + exact_N * density_N, atol=near
  )
