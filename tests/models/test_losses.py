"""Losses against numbers worked by hand.

Dimension key: B batch, O output slots, D width, V vocabulary, G rollouts of a
context, R draws, C chunks, X = B * O targets or B * G rollouts.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from refrag_jax.models import losses, policy


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


HIDDEN_BOD, HEAD_DV = normal(3, 5, 8), normal(8, 30, seed=1)
TARGET_BO = np.random.default_rng(2).integers(0, 30, (3, 5))


def nll_and_grads(block):
  """Weighted, so that each target's gradient counts apart."""
  weight_BO = 1.0 + np.arange(15, dtype=np.float32).reshape(3, 5)

  def total(hidden_BOD, head_DV):
    nll_BO = losses.token_nll(hidden_BOD, head_DV, TARGET_BO, block)
    return (nll_BO * weight_BO).sum(), nll_BO

  return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def shapes(jaxpr):
  """Shapes of every array that a jaxpr makes, its inner ones included."""
  for eqn in jaxpr.eqns:
    yield from (tuple(var.aval.shape) for var in eqn.outvars)
    for inner in core.jaxprs_in_params(eqn.params):
      yield from shapes(inner)


def test_token_nll_is_the_negative_log_softmax_at_the_target():
  logits_BOV = HIDDEN_BOD.astype(float) @ HEAD_DV
  logp_BOV = logits_BOV - np.log(np.exp(logits_BOV).sum(-1, keepdims=True))
  expected_BO = -np.take_along_axis(logp_BOV, TARGET_BO[..., None], 2)[..., 0]
  nll_BO = losses.token_nll(HIDDEN_BOD, HEAD_DV, TARGET_BO, 0)
  np.testing.assert_allclose(nll_BO, expected_BO, rtol=1e-5)


@pytest.mark.parametrize('block', [1, 2, 4, 5, 100])
def test_blocks_change_neither_value_nor_gradient(block):
  (_, nll_BO), grads = nll_and_grads(block)(HIDDEN_BOD, HEAD_DV)
  (_, expected_BO), expected = nll_and_grads(0)(HIDDEN_BOD, HEAD_DV)
  np.testing.assert_allclose(nll_BO, expected_BO, rtol=1e-5)
  for grad, expected_grad in zip(grads, expected):
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_blocked_logits_never_exist_whole_not_even_in_the_backward():
  B, O, D, V = 2, 32, 8, 300
  hidden_BOD, head_DV = normal(B, O, D), normal(D, V)

  def largest(block):
    loss = lambda hidden_BOD, head_DV: losses.token_nll(
      hidden_BOD, head_DV, np.zeros((B, O), int), block
    ).sum()
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(hidden_BOD, head_DV)
    return max(
      math.prod(shape) // V
      for shape in shapes(traced.jaxpr.jaxpr)
      if V in shape and shape != (D, V)
    )

  assert largest(0) == B * O
  assert largest(8) == B * 8


def test_masked_means_are_over_targets_and_0_without_any():
  nll_BO = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
  mask_BO = np.array([[True, False, True], [False, False, False]])
  total, weight = losses.masked_sum(nll_BO, mask_BO)
  assert (float(total), float(weight)) == (5.0, 2.0)
  assert losses.masked_mean(nll_BO, mask_BO).tolist() == [2.5, 0.0]


def test_group_advantage_by_hand():
  """(r - mean) / std within each context: 1 to 3 has std sqrt(2/3)."""
  reward_BG = jnp.array([[1.0, 2.0, 3.0], [-2.0, 0.0, -4.0]])
  s = math.sqrt(1.5)
  np.testing.assert_allclose(
    losses.group_advantage(reward_BG), [[-s, 0, s], [0, s, -s]], atol=1e-6
  )


@pytest.mark.parametrize('G', [2, 3, 6, 7, 8])
def test_a_group_without_variance_has_no_advantage(G):
  """Not even from the rounding of a mean of equal numbers."""
  reward_BG = jnp.tile(normal(50)[:, None] * 3, (1, G))
  advantage_BG = jax.jit(losses.group_advantage)(reward_BG)
  np.testing.assert_array_equal(advantage_BG, 0)


# ratio, advantage -> min(ratio A, clip(ratio, 0.8, 1.2) A) and whether it cut
SURROGATE = [
  (1.0, 2.0, 2.0, False),
  (1.1, 2.0, 2.2, False),
  (1.5, 2.0, 2.4, True),  # gained enough: no more from this sample
  (0.5, 2.0, 1.0, False),  # went the wrong way: the way back stays open
  (1.0, -2.0, -2.0, False),
  (0.9, -2.0, -1.8, False),
  (0.5, -2.0, -1.6, True),
  (1.5, -2.0, -3.0, False),
]


@pytest.mark.parametrize(('ratio', 'advantage', 'value', 'cut'), SURROGATE)
def test_clipped_surrogate_by_hand(ratio, advantage, value, cut):
  def loss(logp):
    old_11 = jnp.full((1, 1), -1.3)
    loss_X, cut_X = losses.clipped_surrogate(
      logp.reshape(1, 1), old_11, jnp.array([advantage]), 0.2
    )
    return loss_X[0], cut_X[0]

  logp = jnp.float32(-1.3 + math.log(ratio))
  (found, cut_found), grad = jax.value_and_grad(loss, has_aux=True)(logp)
  assert float(found) == pytest.approx(-value, rel=1e-5)
  assert bool(cut_found) == cut
  # The gradient of what is cut off is none, of the rest -ratio * A.
  assert float(grad) == pytest.approx(0 if cut else -ratio * advantage, 1e-5)


def test_clipped_surrogate_is_a_mean_over_steps_each_clipped_apart():
  logp_XR = jnp.log(jnp.array([[1.5, 1.0, 0.5], [1.5, 1.0, 0.5]]))
  loss_X, cut_X = losses.clipped_surrogate(
    logp_XR, jnp.zeros((2, 3)), jnp.array([1.0, -1.0]), 0.2
  )
  # min(1.5, 1.2) + 1 + min(0.5, 0.8), then min(-1.5, -1.2) - 1 - 0.8
  np.testing.assert_allclose(loss_X, [-2.7 / 3, 3.3 / 3], rtol=1e-6)
  np.testing.assert_allclose(cut_X, [1 / 3, 1 / 3], rtol=1e-6)


def test_at_theta_old_the_ratio_is_1_and_the_gradient_that_of_reinforce():
  score_BC, picks_BR = jnp.asarray(normal(6, 5)), np.tile([[3, 0, 1]], (6, 1))
  advantage_B = jnp.asarray(normal(6, seed=3))
  old_logp_BR = policy.log_probs(score_BC, picks_BR)

  def surrogate(score_BC):
    logp_BR = policy.log_probs(score_BC, picks_BR)
    return losses.clipped_surrogate(logp_BR, old_logp_BR, advantage_B, 0.2)[0]

  def reinforce(score_BC):
    return -advantage_B * policy.log_probs(score_BC, picks_BR).mean(-1)

  np.testing.assert_allclose(surrogate(score_BC), -advantage_B, rtol=1e-6)
  np.testing.assert_allclose(
    jax.grad(lambda s: surrogate(s).sum())(score_BC),
    jax.grad(lambda s: reinforce(s).sum())(score_BC),
    atol=1e-6,
  )
