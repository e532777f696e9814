"""Sampling: thresholds against sorting, seeds, and Hugging Face's processors.

Dimension key: B rows, V vocabulary.
"""

import jax
import numpy as np
import pytest

from refrag_jax.serve import sampling

B, V = 7, 50


def settings(**given):
  values = dict(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
    seed=0,
  ) | given  # fmt: skip
  kinds = {'top_k': np.int32, 'seed': np.uint32}
  return sampling.Settings(
    **{
      name: np.broadcast_to(np.asarray(x, kinds.get(name, np.float32)), (B,))
      for name, x in values.items()
    }
  )


def logits(seed=0, scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(B, V))).astype(np.float32)


def kept(logits_BV, **given):
  return np.asarray(sampling.keep(logits_BV, settings(**given))) > (
    sampling.NEG / 2
  )


def draw(logits_BV, positions=0, seen_BV=None, **given):
  seen_BV = np.zeros((B, V), bool) if seen_BV is None else seen_BV
  position_B = np.broadcast_to(np.asarray(positions, np.int32), (B,))
  token_B, logprob_B = jax.jit(sampling.sample)(
    logits_BV, seen_BV, settings(**given), position_B
  )
  return np.asarray(token_B), np.asarray(logprob_B)


@pytest.mark.parametrize('seed', range(3))
def test_a_threshold_is_exact(seed):
  rng = np.random.default_rng(seed)
  values_BV = rng.normal(size=(B, V)).astype(np.float32)
  values_BV[0, :5] = [0.0, -0.0, np.inf, -np.inf, 1e-40]
  weights_BV = rng.integers(0, 3, (B, V)).astype(np.float32)
  enough_B = np.array([1, 2, 5, 10, 30, 49, 500], np.float32)
  found_B = np.asarray(sampling.threshold(values_BV, weights_BV, enough_B))
  for values_V, weights_V, enough, found in zip(
    values_BV[1:], weights_BV[1:], enough_B[1:], found_B[1:]
  ):
    reached = [t for t in values_V if weights_V[values_V >= t].sum() >= enough]
    assert found == (max(reached) if reached else sampling.NEG)


@pytest.mark.parametrize('k', [0, 1, 3, 49, 50, 500])
def test_top_k_keeps_the_k_largest(k):
  x_BV = logits()
  order_BV = np.argsort(np.argsort(-x_BV, axis=1), axis=1)
  np.testing.assert_array_equal(kept(x_BV, top_k=k), order_BV < (k or V))


@pytest.mark.parametrize('p', [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_fewest_that_reach_it(p):
  """The one that crosses p is kept, and the likeliest always."""
  x_BV = logits(1)
  p_BV = np.exp(x_BV.astype(np.float64))
  p_BV /= p_BV.sum(1, keepdims=True)
  mask_BV = kept(x_BV, top_p=p)
  for p_V, mask_V in zip(p_BV, mask_BV):
    order = np.argsort(-p_V)
    number = V if p == 1 else 1 + np.searchsorted(np.cumsum(p_V[order]), p)
    assert set(np.flatnonzero(mask_V)) == set(order[:number])


def test_min_p_is_a_share_of_the_likeliest():
  x_BV = logits(2)
  p_BV = np.exp(x_BV - x_BV.max(1, keepdims=True))
  np.testing.assert_array_equal(kept(x_BV, min_p=0.2), p_BV >= 0.2)
  assert kept(x_BV, min_p=1.0).sum(1).tolist() == [1] * B


def test_rows_have_their_own_settings():
  x_BV = logits(3)
  mixed = kept(x_BV, top_k=np.arange(1, B + 1), top_p=np.linspace(0.2, 1, B))
  for b in range(B):
    alone = kept(x_BV, top_k=b + 1, top_p=float(np.linspace(0.2, 1, B)[b]))
    np.testing.assert_array_equal(mixed[b], alone[b])
  assert (mixed.sum(1) <= np.arange(1, B + 1)).all()


def test_at_no_temperature_the_likeliest_is_taken():
  x_BV = logits(4)
  token_B, logprob_B = draw(x_BV, temperature=0.0, top_k=3)
  np.testing.assert_array_equal(token_B, x_BV.argmax(1))
  wanted_B = x_BV.max(1) - np.log(np.exp(x_BV.astype(np.float64)).sum(1))
  np.testing.assert_allclose(logprob_B, wanted_B, rtol=1e-5)


def test_a_warm_row_leaves_the_greedy_ones_alone():
  x_BV = logits(4)
  alone_B, alone_logprob_B = draw(x_BV, temperature=0.0)
  warm = np.array([0, 50, 0, 0, 50, 0, 0])
  token_B, logprob_B = draw(x_BV, temperature=warm, seed=3)
  np.testing.assert_array_equal(token_B[warm == 0], alone_B[warm == 0])
  np.testing.assert_array_equal(
    logprob_B[warm == 0], alone_logprob_B[warm == 0]
  )
  assert (token_B != alone_B).any()


def test_where_all_are_greedy_no_threshold_is_sought():
  """It is under a condition of the program, which the host does not know."""
  lowered = jax.jit(sampling.sample).lower(
    logits(), np.zeros((B, V), bool), settings(), np.zeros(B, np.int32)
  )
  before, branches = str(lowered.as_text()).split('stablehlo.case', 1)
  assert 'stablehlo.while' not in before.split('func.func public @main')[1]
  assert 'stablehlo.while' in branches


def test_of_equals_the_first_is_the_largest():
  x_BV = logits(10)
  x_BV[0, [7, 3, 30]] = 90.0
  x_BV[1] = sampling.NEG
  x_BV[2] = -np.inf
  x_BV[3, 5] = np.inf
  found_B = np.asarray(sampling.first_largest(x_BV))
  np.testing.assert_array_equal(found_B, x_BV.argmax(1))
  x_BV[4] = np.nan  # a model that has diverged
  found_B = np.asarray(sampling.first_largest(x_BV))
  assert ((found_B >= 0) & (found_B < V)).all()


def test_log_probabilities_are_the_models_whatever_is_asked():
  x_BV = logits(5)
  token_B, logprob_B = draw(x_BV, temperature=0.3, top_k=4, top_p=0.7, seed=9)
  all_BV = x_BV - np.log(np.exp(x_BV).sum(1, keepdims=True))
  np.testing.assert_allclose(
    logprob_B, all_BV[np.arange(B), token_B], rtol=1e-4
  )


def test_what_is_drawn_depends_on_seed_and_position_alone():
  x_BV = np.tile(logits(6)[:1], (B, 1))
  seeds, places = np.array([0, 1, 0, 0, 2, 1, 0]), np.array([0] * 5 + [3, 3])
  token_B, _ = draw(x_BV, places, seed=seeds)
  assert token_B[0] == token_B[2] == token_B[3]
  assert len(set(token_B.tolist())) > 1
  other_BV = logits(7)
  other_BV[2] = x_BV[2]  # other rows beside it
  again_B, _ = draw(other_BV, places, seed=seeds)
  assert again_B[2] == token_B[2]


def test_draws_follow_the_probabilities():
  """Chi-squared over what is kept; nothing else is ever drawn."""
  x_BV = np.tile(logits(8, 1.0)[:1], (B, 1))
  number = 600
  tokens = np.concatenate([
    draw(x_BV, i, temperature=0.8, top_k=6, seed=np.arange(B))[0]
    for i in range(number)
  ])  # fmt: skip
  best = np.argsort(-x_BV[0])[:6]
  assert set(tokens) <= set(best)
  p = np.exp(x_BV[0][best].astype(np.float64) / 0.8)
  expected = p / p.sum() * len(tokens)
  counts = np.array([(tokens == t).sum() for t in best])
  assert ((counts - expected) ** 2 / expected).sum() < 25  # 5 degrees; 1e-4


def test_as_hugging_face_has_it():
  """Its processors, one after the other, on the same logits."""
  torch = pytest.importorskip('torch')
  from transformers.generation import logits_process as theirs

  x_BV, rng = logits(9), np.random.default_rng(0)
  seen_BV = rng.random((B, V)) < 0.3
  given = dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
  ids = [torch.tensor(np.flatnonzero(seen_V))[None] for seen_V in seen_BV]
  chain = [
    theirs.TemperatureLogitsWarper(given['temperature']),
    theirs.TopKLogitsWarper(given['top_k']),
    theirs.TopPLogitsWarper(given['top_p']),
    theirs.MinPLogitsWarper(given['min_p']),
  ]
  penalty = theirs.RepetitionPenaltyLogitsProcessor(1.3)
  ours_BV = sampling.penalize(
    x_BV, seen_BV, settings(repetition_penalty=1.3).repetition_penalty
  )
  found_BV = kept(np.asarray(ours_BV) / given['temperature'], **given)
  for b in range(B):
    x_1V = penalty(ids[b], torch.tensor(x_BV[b : b + 1]))
    np.testing.assert_allclose(ours_BV[b], x_1V[0].numpy(), rtol=1e-6)
    for process in chain:
      x_1V = process(ids[b], x_1V)
    np.testing.assert_array_equal(found_BV[b], torch.isfinite(x_1V[0]).numpy())
