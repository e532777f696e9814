"""The decoder: what it computes, and which positions see which.

Dimension key: B batch, T positions, S cache slots, D width, N query heads,
M key/value heads, H head dimension, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from refrag_jax import flops
from refrag_jax.models import layers
from refrag_jax.models.decoder import Decoder

CFG = toy.MODEL.decoder


@functools.cache
def run(cfg=CFG, remat='none', scan_layers=True, attention='dense'):
  """The jitted decoder: f(decoder params, embeds, positions, segments)."""
  dtype = jnp.dtype('float32')
  decoder = Decoder(cfg, dtype, remat, scan_layers, attention)
  return toy.jit(
    lambda params, embeds_BTD, positions_BT, segment_ids_BT=None: decoder.apply(
      {'params': params}, embeds_BTD, positions_BT, segment_ids_BT
    )[0]
  )


def embeds(B, T, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((B, T, CFG.width)).astype(np.float32)


def arange(B, T):
  return np.tile(np.arange(T, dtype=np.int32), (B, 1))


def llama_by_hand(params, tokens_T):
  """Logits (T, V) by the book: float64, a loop over layers, heads, queries."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  T, H = len(tokens_T), CFG.head_dim
  group = CFG.num_heads // CFG.num_kv_heads

  def norm(x_TD, scale_D):
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-3) * scale_D

  def rotate(x_H, t):
    """Each pair (x_i, x_{i+H/2}) turned by t * theta^(-2i/H)."""
    z = x_H[: H // 2] + 1j * x_H[H // 2 :]
    z = z * np.exp(1j * t * 50.0 ** (-2 * np.arange(H // 2) / H))
    return np.concatenate([z.real, z.imag])

  x_TD = p['embed_tokens'][tokens_T]
  for y in range(CFG.num_layers):
    w = jax.tree.map(lambda x: x[y], p['layers'])
    h_TD = norm(x_TD, w['input_layernorm']['scale'])
    for n in range(CFG.num_heads):
      m = n // group
      q_TH = h_TD @ w['q_proj']['kernel'][:, n]
      k_TH = h_TD @ w['k_proj']['kernel'][:, m]
      v_TH = h_TD @ w['v_proj']['kernel'][:, m]
      q_TH = np.stack([rotate(q, t) for t, q in enumerate(q_TH)])
      k_TH = np.stack([rotate(k, t) for t, k in enumerate(k_TH)])
      for t in range(T):
        weight_S = np.exp(k_TH[: t + 1] @ q_TH[t] / np.sqrt(H))
        out_H = weight_S @ v_TH[: t + 1] / weight_S.sum()
        x_TD[t] += out_H @ w['o_proj']['kernel'][n]
    h_TD = norm(x_TD, w['post_attention_layernorm']['scale'])
    gate_TF = h_TD @ w['gate_proj']['kernel']
    h_TF = gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ w['up_proj']['kernel'])
    x_TD += h_TF @ w['down_proj']['kernel']
  return norm(x_TD, p['norm']['scale']) @ p['lm_head']


def test_logits_are_those_of_a_llama_written_by_hand():
  params, tokens_BT = toy.params(), toy.lm_batch(2)['tokens_BT']
  T = tokens_BT.shape[1]
  hidden_BTD = toy.method('lm')(
    params, tokens_BT, arange(2, T), arange(2, T) * 0
  )
  logits_BTV = hidden_BTD @ params['decoder']['lm_head']
  for tokens_T, logits_TV in zip(tokens_BT, logits_BTV):
    expected_TV = llama_by_hand(params['decoder'], tokens_T)
    np.testing.assert_allclose(logits_TV, expected_TV, atol=1e-5, rtol=1e-5)


def test_tied_head_is_the_embedding():
  cfg = toy.replace('decoder', tie_embeddings=True)
  params = toy.params(cfg)
  assert 'lm_head' not in params['decoder']
  head_DV = toy.method('head', cfg)(params)
  np.testing.assert_array_equal(head_DV.T, params['decoder']['embed_tokens'])


def test_who_sees_whom_by_gradient():
  """Two segments of 3 and 2, then one position of padding."""
  segment_BT = np.array([[1, 1, 1, 2, 2, 0]])
  positions_BT = np.array([[0, 1, 2, 0, 1, 0]])
  decode, params = run(), toy.params()['decoder']
  jacobian = toy.jit(
    jax.jacrev(
      lambda x_BTD, segments: decode(params, x_BTD, positions_BT, segments)
    )
  )
  sees = lambda segments: np.abs(
    jacobian(embeds(1, 6), segments)[0, :, :, 0]
  ).max((1, 3)) > 0  # fmt: skip
  one = np.ones((1, 6), np.int32)
  np.testing.assert_array_equal(sees(one), np.tril(np.ones((6, 6))))
  expected_TS = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0],
    [0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 1],
  ]
  np.testing.assert_array_equal(sees(segment_BT), expected_TS)


def test_a_packed_row_equals_its_segments_alone():
  batch = toy.lm_batch(3)
  lm, params = toy.method('lm'), toy.params()
  names = ('tokens_BT', 'positions_BT', 'segment_ids_BT')
  packed_BTD = lm(params, *(batch[name] for name in names))
  for b in range(3):
    for segment in (1, 2):
      here_T = batch['segment_ids_BT'][b] == segment
      alone_T = batch['tokens_BT'][b, here_T]
      T = len(here_T)
      row_1T = np.pad(alone_T, (0, T - len(alone_T)))[None]
      alone_TD = lm(params, row_1T, arange(1, T), np.ones((1, T), int))[0]
      np.testing.assert_allclose(
        packed_BTD[b, here_T], alone_TD[: len(alone_T)], atol=1e-5
      )


def test_right_padding_does_not_matter():
  decode, params, x_BTD = run(), toy.params()['decoder'], embeds(2, 5)
  padded_BTD = np.concatenate([x_BTD, 100 * embeds(2, 3, seed=1)], 1)
  np.testing.assert_allclose(
    decode(params, padded_BTD, arange(2, 8))[:, :5],
    decode(params, x_BTD, arange(2, 5)),
    atol=1e-5,
  )


def test_prefill_and_steps_equal_one_pass():
  """Rows of unequal length: each writes its next slot over its own padding."""
  decoder = Decoder(CFG, jnp.dtype('float32'), 'none', True, 'dense')
  params, x_BTD = toy.params()['decoder'], embeds(2, 9)
  whole_BTD = run()(params, x_BTD, arange(2, 9))
  step = toy.jit(
    lambda x_BTD, positions_BT, cache: decoder.apply(
      {'params': params}, x_BTD, positions_BT, cache=cache
    )
  )
  length_B = np.array([5, 3])
  prompt_BTD = np.where(arange(2, 5)[..., None] < length_B[:, None, None],
                        x_BTD[:, :5], 7.0)  # fmt: skip
  hidden_BTD, cache = step(prompt_BTD, arange(2, 5), {})
  room = ((0, 0), (0, 0), (0, 0), (0, 4), (0, 0))
  cache = jax.tree.map(lambda x_YBMTH: np.pad(x_YBMTH, room), cache)
  for b, length in enumerate(length_B):
    expected = whole_BTD[b, :length]
    np.testing.assert_allclose(hidden_BTD[b, :length], expected, atol=1e-5)
  for i in range(4):
    position_B = length_B + i
    x_B1D = x_BTD[np.arange(2), position_B][:, None]
    hidden_B1D, cache = step(x_B1D, position_B[:, None], cache)
    expected_BD = whole_BTD[np.arange(2), position_B]
    np.testing.assert_allclose(hidden_B1D[:, 0], expected_BD, atol=1e-5)


def test_grouped_queries_equal_repeated_key_value_heads():
  params = toy.params()['decoder']
  wide = jax.tree.map(lambda x: x, params)
  for name in ('k_proj', 'v_proj'):
    kernel_YDMH = params['layers'][name]['kernel']
    wide['layers'][name] = {'kernel': np.repeat(kernel_YDMH, 2, axis=2)}
  every = dataclasses.replace(CFG, num_kv_heads=CFG.num_heads)
  x_BTD = embeds(1, 6)
  np.testing.assert_allclose(
    run()(params, x_BTD, arange(1, 6)),
    run(every)(wide, x_BTD, arange(1, 6)),
    atol=1e-5,
  )


def test_rematerialisation_recomputes_and_changes_no_gradient():
  x_BTD, cost, grads = embeds(1, 6), {}, {}
  for remat in ('none', 'dots', 'full'):
    decode = run(remat=remat)
    grad = toy.jit(
      jax.grad(lambda params: (decode(params, x_BTD, arange(1, 6)) ** 3).sum())
    )
    traced = grad.trace(toy.params()['decoder'])
    cost[remat] = flops.count(traced.jaxpr)
    grads[remat] = grad(toy.params()['decoder'])
  assert cost['none'] < cost['dots'] < cost['full']
  assert toy.distance(grads['none'], grads['dots']) < 1e-5
  assert toy.distance(grads['none'], grads['full']) < 1e-5


@pytest.mark.parametrize('shift', [1, 1000])
def test_rotary_scores_depend_on_the_distance_alone(shift):
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

  def score(at, other):
    at, other = (
      layers.rope_angles(jnp.array([[t]]), 8, 50.0) for t in (at, other)
    )
    return float((layers.apply_rope(q, at) * layers.apply_rope(k, other)).sum())

  assert score(8 + shift, 3 + shift) == pytest.approx(score(8, 3), abs=2e-4)
  assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)
  assert abs(score(8, 3) - score(3, 8)) > 0.1
