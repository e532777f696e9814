"""Distillation from the decoder with the context as tokens.

Dimension key: B batch, O output slots, D width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_run
from scipy import special

from refrag_jax import flops
from refrag_jax.errors import UserError
from refrag_jax.models import losses
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, train_step

WEIGHT, TEMPERATURE = 0.5, 2.0
CFG = dict(distill_weight=WEIGHT, distill_temperature=TEMPERATURE)


@pytest.mark.parametrize('block', [0, 3])
def test_the_divergence_in_closed_form(block):
  rng = np.random.default_rng(0)
  ours_BOD, theirs_BOD = rng.standard_normal((2, 2, 5, 8)).astype(np.float32)
  head_DV = rng.standard_normal((8, 11)).astype(np.float32)
  p, q = (
    special.softmax(x.astype(float) @ head_DV / TEMPERATURE, -1)
    for x in (theirs_BOD, ours_BOD)
  )
  expected = TEMPERATURE**2 * (p * np.log(p / q)).sum(-1)
  kl = lambda ours, theirs, head: losses.token_kl(
    ours, theirs, head, TEMPERATURE, block
  )
  np.testing.assert_allclose(
    kl(ours_BOD, theirs_BOD, head_DV), expected, rtol=1e-4
  )
  assert np.abs(kl(ours_BOD, ours_BOD, head_DV)).max() < 1e-6
  # The gradient of softmax cross entropy, through the student alone.
  of_ours, of_theirs, of_head = jax.grad(
    lambda *args: kl(*args).sum(), argnums=(0, 1, 2)
  )(ours_BOD, theirs_BOD, head_DV)
  slope_BOV = TEMPERATURE * (q - p)
  np.testing.assert_allclose(of_ours, slope_BOV @ head_DV.T, atol=1e-4)
  np.testing.assert_allclose(
    of_head, np.einsum('BOD,BOV->DV', ours_BOD, slope_BOV), atol=1e-4
  )
  np.testing.assert_array_equal(of_theirs, np.zeros_like(of_theirs))


def step(name, cfg, model=toy.MODEL):
  variant, _ = toy.STEPS.get(name, (None, {}))
  stage, params = STAGES[name], toy.params(model)
  state = TrainState(jnp.int32(0), params, init_opt_state(params, stage))
  run = lambda state, batch: train_step(
    state, batch, jax.random.key(0), 1e-2,
    model=Refrag(model), stage=stage, cfg=cfg, variant=variant,
  )  # fmt: skip
  return run, (state, toy.step_batch(name))


@pytest.mark.parametrize('model', [toy.MODEL, toy.LORA], ids=['all', 'lora'])
@pytest.mark.parametrize('name', ['cpt', 'mixed'])
def test_the_loss_is_the_nlls_plus_the_weighted_divergence(name, model):
  """The teacher reads all of the context, with no adapter."""
  cfg = toy.stage(**CFG)
  run, (state, batch) = step(name, cfg, model)
  _, with_it = toy.jit(run)(state, batch)
  run, _ = step(name, toy.stage(), model)
  _, without = toy.jit(run)(state, batch)
  kl = float(with_it['distill_kl'])
  assert kl > 0.01 and 'distill_kl' not in without
  assert float(with_it['loss']) == pytest.approx(
    float(without['loss']) + WEIGHT * kl, rel=1e-5
  )
  if name == 'cpt':
    mask_BO = batch['loss_mask_BO']
    plain = {k: x for k, x in state.params.items() if k != 'lora'}
    states = lambda cfg, params, **how: Refrag(cfg).apply(
      {'params': params}, **how
    )
    teacher = states(
      toy.MODEL, plain, batch=batch, context='full', method=Refrag.plain_states
    )
    c_BCE = states(
      model, state.params, batch=batch, method=Refrag.chunk_embeddings
    )
    ours = states(
      model, state.params, batch=batch, c_BCE=c_BCE,
      expand_BC=jnp.zeros(c_BCE.shape[:2], bool), num_expanded=0,
      method=Refrag.output_states,
    )  # fmt: skip
    head_DV = states(model, state.params, method=Refrag.head)
    kl_BO = losses.token_kl(ours, teacher, head_DV, TEMPERATURE, 0)
    assert kl == pytest.approx(float(kl_BO[mask_BO].mean()), rel=1e-4)


def test_its_flops_are_counted():
  """At least those of the decoder over the context as tokens."""
  count = lambda cfg: flops.count(
    jax.make_jaxpr(step('cpt', cfg)[0])(*step('cpt', cfg)[1])
  )
  batch = toy.step_batch('cpt')
  B, C, K = batch['chunks_BCK'].shape
  d = toy.MODEL.decoder
  of_token = d.num_layers * (
    d.width * (2 * d.num_heads + 2 * d.num_kv_heads) * d.head_dim
    + 3 * d.width * d.mlp_width
  )
  assert count(toy.stage(**CFG)) - count(toy.stage()) > 2 * B * C * K * of_token


REFUSED = {
  'stage__cpt__distill_weight': (-1.0, 'must be 0 or greater'),
  'stage__reconstruct__distill_weight': (0.5, 'there is a teacher'),
}


@pytest.mark.parametrize('key', REFUSED)
def test_what_is_refused(key):
  value, sentence = REFUSED[key]
  name = key.split('__')[1]
  with pytest.raises(UserError, match=sentence):
    toy_run.config('', **{key: value, 'stages': ('lm', 'reconstruct', name)[
      : 3 if name == 'cpt' else 2]})  # fmt: skip


def test_a_control_arm_may_follow_a_distilled_stage():
  """And the teacher's positions count for the limit of the decoder."""
  stages = ('lm', 'reconstruct', 'cpt', 'cpt_trained')
  config = toy_run.config('', stages=stages, stage__cpt__distill_weight=0.5)
  cfg, chunks = config.stage['cpt'], 0
  stage = STAGES['cpt']
  chunks = stage.task.num_chunks(config, 'cpt')
  off = dataclasses.replace(cfg, distill_weight=0.0)
  plain = toy_run.replaced(config, stage=config.stage | {'cpt': off})
  assert stage.longest(config) - stage.longest(plain) == chunks * (
    config.model.chunk_size - 1
  )
