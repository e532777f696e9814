"""The policy: the paper's sequential masked softmax (A.1), drawn and scored.

Dimension key: B batch, C chunks, R draws, E encoder width.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from refrag_jax.models import policy
from refrag_jax.step import row_keys

SCORES = (0.5, -1.0, 1.5, 0.0)


def step_by_step(scores, picks):
  """log pi of each draw in turn: n_j is infinite for what was drawn before."""
  left, logps = list(range(len(scores))), []
  for pick in picks:
    total = math.fsum(math.exp(scores[j]) for j in left)
    logps.append(scores[pick] - math.log(total))
    left.remove(pick)
  return logps


def score(c_BCE, valid_BC=None, positions=True):
  """Logits of toy parameters, whose last layer is not zero."""
  if valid_BC is None:
    valid_BC = np.ones(c_BCE.shape[:2], bool)
  run = toy.method('score', toy.replace('policy', positions=positions))
  return np.asarray(run(toy.params(), c_BCE, valid_BC))


def vectors(B, C, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((B, C, toy.MODEL.encoder.width)).astype(np.float32)


def test_log_probs_are_the_sequential_masked_softmax():
  rng = np.random.default_rng(0)
  score_BC = 3 * rng.standard_normal((5, 7))
  picks_BR = rng.random((5, 7)).argsort(1)[:, :4]
  logp_BR = policy.log_probs(score_BC.astype(np.float32), picks_BR)
  expected_BR = [step_by_step(*row) for row in zip(score_BC, picks_BR)]
  np.testing.assert_allclose(logp_BR, expected_BR, atol=1e-5)


def test_probabilities_of_all_ordered_draws_sum_to_one():
  picks_XR = np.array(list(itertools.permutations(range(4), 3)))
  scores_XC = jnp.tile(jnp.array(SCORES), (len(picks_XR), 1))
  logp_X = policy.log_probs(scores_XC, picks_XR).sum(1)
  assert float(jnp.exp(logp_X).sum()) == pytest.approx(1, abs=1e-6)


def test_samples_follow_those_probabilities():
  """Chi-square over the 12 ordered pairs of 4 chunks, 100,000 draws."""
  N = 100_000
  scores_NC = jnp.tile(jnp.array(SCORES), (N, 1))
  picks_NR = np.asarray(
    policy.sample(row_keys(jax.random.key(0), N), scores_NC, 2)
  )
  chi_square = 0.0
  for pair in itertools.permutations(range(4), 2):
    expected = N * math.exp(sum(step_by_step(SCORES, pair)))
    seen = (picks_NR == pair).all(1).sum()
    chi_square += (seen - expected) ** 2 / expected
  assert chi_square < 31.3  # 99.9 % quantile at 11 degrees of freedom


def test_absent_chunks_are_never_drawn():
  rng = np.random.default_rng(0)
  valid_BC = rng.random((300, 6)).argsort(1) < 3
  score_BC = score(vectors(300, 6), valid_BC)
  for picks_BR in (
    policy.sample(row_keys(jax.random.key(1), 300), score_BC, 3),
    policy.greedy(score_BC, 3),
  ):
    mask_BC = policy.to_mask(picks_BR, 6)
    # Three are there and three are drawn: all of them, nothing else.
    np.testing.assert_array_equal(mask_BC, valid_BC)


def test_more_draws_than_chunks_cost_no_gradient():
  """What is drawn of nothing has probability 1: no ratio, no NaN."""
  score_BC = jnp.array([[0.3, policy.NEG, 0.7, policy.NEG]])
  picks_BR = policy.sample(row_keys(jax.random.key(0), 1), score_BC, 4)
  logp_BR = policy.log_probs(score_BC, picks_BR)
  assert sorted(picks_BR[0, :2].tolist()) == [0, 2]
  np.testing.assert_array_equal(logp_BR[0, 2:], 0)
  grad_BC = jax.grad(lambda s: policy.log_probs(s, picks_BR).sum())(score_BC)
  assert jnp.isfinite(grad_BC).all()


def test_greedy_takes_the_highest_in_order():
  picks_BR = policy.greedy(jnp.array([SCORES]), 3)
  assert picks_BR.tolist() == [[2, 0, 3]]
  mask_BC = policy.to_mask(picks_BR, 4)
  assert mask_BC.tolist() == [[True, False, True, True]]


def test_a_fresh_policy_is_uniform_over_the_chunks_that_are_there():
  valid_BC = np.array([[True, True, False, True]])
  cfg = dataclasses.replace(toy.MODEL.policy, num_layers=1)
  fresh = toy.jit(policy.Policy(cfg).init_with_output)
  score_BC, _ = fresh(jax.random.key(0), vectors(1, 4), valid_BC)
  prob_BC = jax.nn.softmax(score_BC)
  np.testing.assert_allclose(prob_BC, valid_BC / 3, atol=1e-7)


def test_absent_chunks_do_not_touch_the_scores_of_others():
  c_BCE, valid_BC = vectors(1, 4), np.array([[True, False, True, True]])
  other_BCE = c_BCE.copy()
  other_BCE[0, 1] = 100
  np.testing.assert_array_equal(
    score(c_BCE, valid_BC), score(other_BCE, valid_BC)
  )


@pytest.mark.parametrize('positions', [False, True])
def test_positions_tell_the_order_of_chunks(positions):
  """Without them, permuting the chunks permutes the scores; with them not."""
  c_BCE, order_C = vectors(2, 5), np.array([3, 0, 4, 1, 2])
  score_BC = score(c_BCE, positions=positions)
  permuted_BC = score(c_BCE[:, order_C], positions=positions)
  gap = np.abs(permuted_BC - score_BC[:, order_C]).max()
  assert gap > 1e-2 if positions else gap < 1e-5
