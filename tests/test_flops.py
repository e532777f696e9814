"""FLOPs: the counter on known functions, then every stage at the paper's size.

Dimension key: B batch, C chunks, K chunk size, M encoder tokens of a chunk,
Q prefix slots, O output slots, T positions.
"""

import dataclasses
import functools

import closed_form
import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax._src.cudnn import fused_attention_stablehlo

from configs import llama2_7b
from refrag_jax import compilation, flops, sharding
from refrag_jax.models import attention
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.resolve import build
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, train_step

A, B = np.zeros((3, 5), np.float32), np.zeros((5, 7), np.float32)
PRODUCT = 2 * 3 * 5 * 7


def count(f, *args):
  return flops.count(jax.make_jaxpr(f)(*args))


def scanned(a):
  return jax.lax.scan(lambda a, _: (jnp.tanh(a @ B @ B.T), None), a, None, 4)[0]


@pytest.mark.parametrize(
  ('f', 'products'),
  [
    (lambda a: a @ B, 1),
    (lambda a: jnp.sin(a) + a, 0),
    (jax.jit(lambda a: jax.jit(lambda a: a @ B)(a)), 1),
    (lambda a: jax.vmap(lambda a: a @ B)(jnp.stack([a, a])), 2),
    (lambda a: jnp.einsum('ij,jk->ki', a, B), 1),
    (scanned, 4 * 2),
    (jax.grad(lambda a: scanned(a).sum()), 2 * 4 * 2),
    (lambda a: jax.lax.map(lambda a: a @ B, jnp.stack([a] * 3)), 3),
    (
      lambda a: jax.lax.cond(
        a.sum() > 0, lambda a: a @ B @ B.T, lambda a: a * 2, a
      ),
      2,
    ),
    (jax.grad(lambda a: (a @ B).sum()), 2),
    (jax.grad(lambda a: jax.checkpoint(lambda a: jnp.sin(a @ B))(a).sum()), 3),
  ],
)
def test_counter_on_known_functions(f, products):
  assert count(f, A) == products * PRODUCT


# Of the paper's run: its model, k, and lengths. Costs scale with the rows, and
# memory is none: everything is traced on shapes.
CONFIG = build(llama2_7b.get_config('k16'))
MODEL = compilation.plain_model(CONFIG.model)
ROWS = 2
K, L, O = 16, 128, 2048
DATA = CONFIG.data


# CEPE: pieces of 256 tokens, with room for their chunks' text.
PIECE = 256
PIECES, PIECE_M = L * K // PIECE, PIECE // K * (DATA.max_encoder_tokens - 2) + 2


def refrag_batch(C, Q, O):
  i32 = lambda *shape: jax.ShapeDtypeStruct((ROWS, *shape), jnp.int32)
  M = DATA.max_encoder_tokens
  return {
    'prefix_BQ': i32(Q),
    'prefix_len_B': i32(),
    'chunks_BCK': i32(C, K),
    'chunk_len_BC': i32(C),
    'encoder_BCM': i32(C, M),
    'encoder_len_BC': i32(C),
    'output_BO': i32(O),
    'output_len_B': i32(),
    'loss_mask_BO': jax.ShapeDtypeStruct((ROWS, O), bool),
    'piece_BPM': i32(PIECES, PIECE_M),
    'piece_len_BP': i32(PIECES),
  }


def lm_batch(T):
  i32 = jax.ShapeDtypeStruct((ROWS, T), jnp.int32)
  return dict.fromkeys(('tokens_BT', 'positions_BT', 'segment_ids_BT'), i32)


def step_cost(name, batch, variant, cfg):
  """FLOPs a row of the stage's whole step, preparation included."""
  stage = STAGES[name]
  has_cross = name.startswith('cepe')
  model = dataclasses.replace(MODEL, piece_length=PIECE * has_cross)

  def state(key):
    params = init_params(model, key)
    return TrainState(jnp.int32(0), params, init_opt_state(params, stage))

  run = functools.partial(
    train_step, model=Refrag(model), stage=stage, cfg=cfg, variant=variant
  )
  key = jax.random.key(0)
  traced = jax.jit(run).trace(
    jax.eval_shape(state, key), batch, key, np.float32(0)
  )
  return flops.count(traced.jaxpr) / ROWS


def window(factor=L, Q=1, O=O):
  return refrag_batch(factor, Q, O)


SFT = dict(
  C=DATA.num_passages * DATA.passage_chunks,
  Q=DATA.question_length,
  O=DATA.answer_length,
)
M = DATA.max_encoder_tokens
EXPANDED, G, UPDATES = 12, 8, 2
CASES = {
  'lm': (lm_batch(4096), None, closed_form.lm(MODEL, 4096)),
  'reconstruct': (
    window(O=L * K), None, closed_form.reconstruct(MODEL, L, M)),
  'cpt': (window(), None, closed_form.continued(MODEL, 1, L, M, O)),
  'mixed': (
    window(), EXPANDED, closed_form.continued(MODEL, 1, L, M, O, EXPANDED)),
  'grpo': (
    window(), EXPANDED,
    closed_form.grpo(MODEL, L, M, O, EXPANDED, G, UPDATES)),
  'sft': (
    refrag_batch(**SFT), None,
    closed_form.continued(MODEL, SFT['Q'], SFT['C'], M, SFT['O'])),
  'cpt_trained none': (window(), 'none', closed_form.control(MODEL, 0, O)),
  'cpt_trained last_k': (window(), 'last_k', closed_form.control(MODEL, L, O)),
  'cpt_trained full': (window(), 'full', closed_form.control(MODEL, L * K, O)),
  'cepe': (
    window(), None,
    closed_form.cepe(MODEL, PIECES, PIECE_M, O, closed_form.FROZEN)),
  'cepe_unfrozen': (
    window(), None,
    closed_form.cepe(MODEL, PIECES, PIECE_M, O, closed_form.TRAINED)),
}  # fmt: skip


@pytest.mark.parametrize('name', list(CASES))
def test_a_step_at_the_papers_size_costs_the_closed_form(name):
  batch, variant, expected = CASES[name]
  updates = UPDATES if name == 'grpo' else 0
  cfg = toy.stage(num_generations=G, updates_per_rollout=updates)
  found = step_cost(name.split()[0], batch, variant, cfg)
  # Not to the last one: each rollout projects the shared vectors again.
  assert found == pytest.approx(expected, rel=1e-3)


def test_closed_form_of_known_sizes():
  """LLaMA-2-7B has 6.74e9 parameters, RoBERTa-Large's layers 3.02e8."""
  d, e = MODEL.decoder, MODEL.encoder
  linear = closed_form.decoder(d, 1, 0, closed_form.FORWARD)
  attention = 4 * d.num_layers * d.width
  embeddings = 2 * d.vocab_size * d.width
  assert (linear - attention) / 2 + embeddings == pytest.approx(6.738e9, 1e-3)
  encoder = closed_form.chunks(MODEL, 1, 1, closed_form.FORWARD)
  encoder -= closed_form.project(MODEL, 1) + 4 * e.num_layers * e.width
  assert encoder / 2 == pytest.approx(3.02e8, 1e-2)


def test_what_each_device_does_counts_for_all_of_them():
  x_BD, w_DF = jnp.ones((8, 4)), jnp.ones((4, 6))
  whole = lambda x_BD: x_BD @ w_DF
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    mapped = sharding.per_device(whole, (('batch', None),), ('batch', None))
    # Rows over four devices; the two of `tensor` repeat each other.
    assert flops.count(jax.make_jaxpr(mapped)(x_BD)) == 2 * 2 * 8 * 4 * 6
  assert flops.count(jax.make_jaxpr(whole)(x_BD)) == 2 * 8 * 4 * 6


def test_a_kernel_counts_as_often_as_it_runs():
  """The TPU's attention: two products, of queries and keys, of weights and values."""
  B, T, N, H = 2, 256, 2, 128
  q_BTNH = jnp.ones((B, T, N, H))
  attend = functools.partial(attention.splash, query=None, key=None, window=0)
  forward = jax.make_jaxpr(attend)(q_BTNH, q_BTNH, q_BTNH)
  assert flops.count(forward) == 2 * 2 * B * N * T * T * H


def test_nvidias_kernel_counts_by_its_shapes(monkeypatch):
  """2 products forward, 5 behind; traced alone, where there is no cuDNN."""
  monkeypatch.setattr(
    fused_attention_stablehlo, 'check_cudnn_version', lambda: 91_000
  )
  B, T, N, M, H = 2, 64, 4, 2, 64
  q_BTNH = jnp.ones((B, T, N, H), jnp.bfloat16)
  k_BSMH = jnp.ones((B, T, M, H), jnp.bfloat16)

  def f(q_BTNH, k_BSMH, v_BSMH):
    out_BTNH = attention.cudnn(q_BTNH, k_BSMH, v_BSMH, None, None, 0)
    return out_BTNH.astype(jnp.float32).sum()

  product = 2 * B * N * T * T * H
  assert count(f, q_BTNH, k_BSMH, k_BSMH) == 2 * product
  assert count(jax.grad(f, (0, 1, 2)), q_BTNH, k_BSMH, k_BSMH) == 7 * product


def test_flops_are_those_of_the_step():
  """Against the closed forms that test_flops holds against jaxprs."""
  m, T, L, M = toy.MODEL, 9, 4, 5
  d, e, p = (
    dataclasses.asdict(part) for part in (m.decoder, m.encoder, m.policy)
  )
  assert flops.decoder_flops(d, T) == closed_form.decoder(
    m.decoder, T, 0, closed_form.FORWARD
  )
  chunks = flops.encoder_flops(e, L, M) + flops.projection_flops(e, d, L)
  assert chunks == closed_form.chunks(m, L, M, closed_form.FORWARD)
  assert flops.policy_flops(p, e, L) == closed_form.policy(
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
    flops.encoder_flops(e, P, piece)
    + flops.decoder_flops(d, T)
    + flops.cross_attention_flops(e, d, T, states)
    + 2 * d['width'] * d['vocab_size'] * O
  )
  assert counted == expected
