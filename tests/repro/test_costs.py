"""Table 6's closed forms against the paper's ratios, FLOPs against the models."""

import dataclasses

import closed_form
import forward
import jax
import pytest
import toy

from refrag_jax import flops
from refrag_jax.models.refrag import init_params
from refrag_jax.repro import costs
from refrag_jax.repro.costs import LLAMA2_7B


@pytest.mark.parametrize(
  ('s', 'k', 'expected'),
  [
    (16_384, 8, 12.3), (16_384, 16, 25.6), (16_384, 32, 52.2),
    (65_536, 8, 22.0), (65_536, 16, 50.3), (65_536, 32, 108),
  ],
)  # fmt: skip
def test_time_to_first_token(s, k, expected):
  """Ratios of the closed form for Llama-2-7B, to the digits given."""
  assert costs.ttft_ratio(LLAMA2_7B, s, k) == pytest.approx(
    expected, abs=0.05 if expected < 100 else 0.5
  )


def test_time_of_later_tokens():
  ratio = lambda s: costs.ttit_ratio(LLAMA2_7B, s, 0, 16)
  assert ratio(65_536) == pytest.approx(3.06, abs=0.005)
  assert ratio(16_384) == pytest.approx(1.57, abs=0.005)


@pytest.mark.parametrize('s', [256, 4096, 65_536])
@pytest.mark.parametrize('k', [8, 32])
def test_ratios_are_those_that_table_6_prints(s, k):
  d, l, n, o = LLAMA2_7B.width, LLAMA2_7B.layers, LLAMA2_7B.params, 512
  printed = k**2 * (6 * d * s + s**2) / (6 * d * s * k + s**2)
  assert costs.ttft_ratio(LLAMA2_7B, s, k) == pytest.approx(printed)
  printed = (2 * d * l * s * k + n * k + 2 * d * l * o * k) / (
    2 * d * l * s + n * k + 2 * d * l * o * k
  )
  assert costs.ttit_ratio(LLAMA2_7B, s, o, k) == pytest.approx(printed)
  cache = [costs.kv_cache_bytes(LLAMA2_7B, s, o, x) for x in (1, k)]
  assert costs.kv_cache_ratio(s, o, k) == pytest.approx(cache[0] / cache[1])


def test_limits_of_table_6():
  """TTFT: k to k^2; TTIT: 1 to k; cache: to k; throughput: 1 to k^2."""
  k, short, long = 16, 1, 10**9
  assert costs.ttft_ratio(LLAMA2_7B, short, k) == pytest.approx(k, rel=0.01)
  assert costs.ttft_ratio(LLAMA2_7B, long, k) == pytest.approx(k**2, rel=0.01)
  assert costs.ttit_ratio(LLAMA2_7B, short, 0, k) == pytest.approx(1, 0.01)
  assert costs.ttit_ratio(LLAMA2_7B, long, 0, k) == pytest.approx(k, 0.01)
  assert costs.kv_cache_ratio(long, 1, k) == pytest.approx(k, rel=0.01)
  speed = lambda s, k: costs.tokens_per_second(
    LLAMA2_7B, s, 64, k, flops_per_s=3e14, bytes_per_s=2e12
  )
  gains = [speed(s, k) / speed(s, 1) for s in (64, 4096, 65_536, 10**8)]
  assert gains == sorted(gains) and gains[0] < 1.5 < k < gains[-1] < k**2


def test_flops_are_those_of_the_step():
  """Against the closed forms that test_flops holds against jaxprs."""
  m, T, L, M = toy.MODEL, 9, 4, 5
  d, e, p = (
    dataclasses.asdict(part) for part in (m.decoder, m.encoder, m.policy)
  )
  assert costs.decoder_flops(d, T) == closed_form.decoder(
    m.decoder, T, 0, closed_form.FORWARD
  )
  chunks = costs.encoder_flops(e, L, M) + costs.projection_flops(e, d, L)
  assert chunks == closed_form.chunks(m, L, M, closed_form.FORWARD)
  assert costs.policy_flops(p, e, L) == closed_form.policy(
    m, L, closed_form.FORWARD
  )


def test_flops_of_cepe():
  """Encoder, decoder and cross-attention, against what CEPE's jaxpr counts."""
  m, B, O = toy.CEPE, 2, 5
  batch = toy.batch(B, O=O)
  params = jax.eval_shape(lambda key: init_params(m, key), jax.random.key(0))
  counted = flops.count(
    jax.make_jaxpr(
      lambda params, batch: forward.cepe_nll(toy.model(m), params, batch)
    )(params, batch)
  )
  d, e = dataclasses.asdict(m.decoder), dataclasses.asdict(m.encoder)
  _, P, piece = batch['piece_BPM'].shape
  T = batch['prefix_BQ'].shape[1] + O - 1
  states = P * piece + 1  # and one to read where there is nothing else
  expected = B * (
    costs.encoder_flops(e, P, piece)
    + costs.decoder_flops(d, T)
    + costs.cross_attention_flops(e, d, T, states)
    + 2 * d['width'] * d['vocab_size'] * O
  )
  assert counted == expected
