"""REPLUG: a mixture whose weights follow what the pieces have predicted.

Dimension key: B batch, C chunks, K chunk size, P pieces, O outputs.
"""

import functools

import forward
import jax
import numpy as np
import pytest
import toy

from refrag_jax import flops
from refrag_jax.evals import replug

PARAMS = toy.params()


def whole(B=3, C=4, K=toy.K, O=5, seed=0):
  """A batch without ragged chunks, as windows of text give it."""
  batch = toy.batch(B, C, O=O, seed=seed)
  rng = np.random.default_rng(seed)
  ids_BCK = rng.integers(1, toy.MODEL.decoder.vocab_size, (B, C, K))
  return batch | {
    'chunks_BCK': ids_BCK.astype(np.int32),
    'chunk_len_BC': np.full((B, C), K, np.int32),
  }


def ensemble(batch):
  run = toy.jit(functools.partial(replug.nll, toy.model()))
  return np.asarray(run(PARAMS, batch))


def plain(batch, context):
  run = functools.partial(forward.plain_nll, toy.model(), context=context)
  return np.asarray(toy.jit(run)(PARAMS, batch))


def after(batch, begin, length):
  """The decoder after some of the context's tokens."""
  tokens_BS = batch['chunks_BCK'].reshape(len(batch['doc_B']), -1)
  part = batch | {
    'chunks_BCK': tokens_BS[:, None, begin : begin + length],
    'chunk_len_BC': np.full((len(tokens_BS), 1), length, np.int32),
  }
  return plain(part, 'full')


def drawn(B=2, P=4, O=7, seed=0):
  """NLLs of any ensemble."""
  rng = np.random.default_rng(seed)
  return rng.gamma(2, 1, (B, P, O)).astype(np.float32)


def test_the_product_over_tokens_is_the_likelihood_of_the_uniform_mixture():
  """In float64, straight from the definition, over every prefix."""
  nll_BPO = drawn()
  found_BO, _ = replug.mixture(nll_BPO)
  likelihood_BPO = np.exp(-np.cumsum(nll_BPO.astype(np.float64), -1))
  expected_BO = -np.log(likelihood_BPO.mean(1))
  np.testing.assert_allclose(np.cumsum(found_BO, -1), expected_BO, rtol=1e-5)


def test_weights_are_equal_at_first_and_always_sum_to_one():
  _, log_weight_BPO = replug.mixture(drawn())
  weight_BPO = np.exp(log_weight_BPO)
  np.testing.assert_allclose(weight_BPO[..., 0], 1 / 4, rtol=1e-6)
  np.testing.assert_allclose(weight_BPO.sum(1), 1, rtol=1e-5)
  assert weight_BPO.std(1)[:, 1:].min() > 0.01


def test_weights_have_seen_no_output_from_theirs_on():
  nll_BPO, t = drawn(), 3
  _, before = replug.mixture(nll_BPO)
  changed = nll_BPO.copy()
  changed[:, 1, t] += 2
  _, after = replug.mixture(changed)
  same_O = (np.asarray(before) == np.asarray(after)).all((0, 1))
  assert same_O.tolist() == [o <= t for o in range(7)]


def test_a_piece_that_predicts_better_takes_the_weight():
  nll_BPO = np.full((1, 3, 40), 2.0, np.float32)
  nll_BPO[:, 1] = 1.0
  nll_BO, log_weight_BPO = replug.mixture(nll_BPO)
  assert np.exp(log_weight_BPO[0, 1, -1]) > 0.999
  # It costs log P altogether not to have known which one.
  np.testing.assert_allclose(nll_BO.sum(), 40 + np.log(3), rtol=1e-5)


def test_long_outputs_lose_no_precision():
  """2048 tokens at 8 nats: differences of sums would be off by 1e-3."""
  nll_BPO = 8 + 0.01 * drawn(B=1, P=3, O=2048, seed=1)
  found_BO, _ = replug.mixture(nll_BPO)
  logp_BPO = -np.cumsum(nll_BPO.astype(np.float64), -1)
  top_BO = logp_BPO.max(1)
  total_BO = np.log(np.exp(logp_BPO - top_BO[:, None]).mean(1)) + top_BO
  expected_BO = -np.diff(total_BO, prepend=0.0)
  np.testing.assert_allclose(found_BO, expected_BO, rtol=0, atol=1e-5)


def test_identical_pieces_are_one_piece():
  batch = whole(C=4)
  piece_B1C = batch['chunks_BCK'].reshape(3, toy.K, 4)[:, :1]
  same = np.repeat(piece_B1C, toy.K, 1).reshape(3, 4, toy.K)
  batch['chunks_BCK'] = same
  one_BO = after(batch, 0, 4)
  np.testing.assert_allclose(ensemble(batch), one_BO, rtol=1e-5)


def test_one_piece_is_the_last_tokens():
  """With k = 1 REFRAG has as many positions as the context has tokens."""
  batch = whole(C=4, K=1)
  np.testing.assert_allclose(ensemble(batch), plain(batch, 'last_k'), rtol=1e-5)


@pytest.mark.parametrize('C', [1, 4, 5])
def test_pieces_are_k_stretches_of_as_many_tokens_as_there_are_chunks(C):
  """Their NLLs one at a time, then the mixture."""
  batch = whole(C=C)
  nll_BPO = np.stack([after(batch, i * C, C) for i in range(toy.K)], 1)
  expected_BO, _ = replug.mixture(nll_BPO)
  np.testing.assert_allclose(ensemble(batch), expected_BO, rtol=1e-5)
  swapped = batch | {'chunks_BCK': batch['chunks_BCK'][::-1]}
  assert (np.abs(ensemble(swapped)[0] - expected_BO[0]) > 1e-4).all()


def test_all_pieces_go_through_one_decoder_call():
  """At k times the cost of one; each layer's products are there once."""
  batch = whole(B=2, C=4)
  jaxpr = jax.make_jaxpr(lambda batch: replug.nll(toy.model(), PARAMS, batch))(
    batch
  )
  one = jax.make_jaxpr(
    lambda batch: forward.plain_nll(toy.model(), PARAMS, batch, 'last_k')
  )(batch)
  assert flops.count(jaxpr) == toy.K * flops.count(one)
  scans = lambda jaxpr: str(jaxpr).count('scan[')
  assert scans(jaxpr) == scans(one)
