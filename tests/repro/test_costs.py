"""Closed forms of FLOPs against the models."""

import dataclasses

import closed_form
import forward
import jax
import toy

from refrag_jax import flops
from refrag_jax.models.refrag import init_params
from refrag_jax.repro import costs


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
