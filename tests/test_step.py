"""The training step: what it moves, what it must not move, what it costs.

Dimension key: B batch, C chunks, O output slots, G rollouts of a context,
R draws.
"""

import dataclasses
import functools
import re

import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from refrag_jax import flops
from refrag_jax.models import losses, policy
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES, compressed, grpo
from refrag_jax.stages.stage import Stage
from refrag_jax.state import TrainState, merge, partition
from refrag_jax.step import init_opt_state, row_keys, train_step

KEY = jax.random.key(0)
OFTEN = ('lm', 'cpt', 'mixed', 'grpo')  # compiled for other tests as well


def named(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_str(path): np.asarray(leaf) for path, leaf in leaves}


def same_bits(tree, other):
  """Bitwise: NaN equals NaN, 0 does not equal -0."""
  one, two = named(tree), named(other)
  assert one.keys() == two.keys()
  return all(one[name].tobytes() == two[name].tobytes() for name in one)


@pytest.mark.parametrize(
  'name',  # tests/stages/test_stages.py has all others
  [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
    for name in toy.STEPS
  ],
)
def test_frozen_groups_stay_bitwise_and_hold_no_moments(name):
  """Agreement 6, and that everything else does move."""
  state = toy.state(name)
  new_state, metrics = toy.step(name)(state, toy.step_batch(name))
  assert bool(metrics['finite']) and int(new_state.step) == 1
  groups = {
    'lm': ('decoder',),
    'reconstruct': ('encoder', 'projection'),
    'cpt': ('decoder', 'encoder', 'projection'),
    'mixed': ('decoder', 'encoder', 'projection'),
    'grpo': ('policy',),
    'cpt_trained': ('decoder',),
    'cepe': ('cross', 'encoder'),
  }[name]
  for group, before in state.params.items():
    after = new_state.params[group]
    assert same_bits(before, after) == (group not in groups), group
  moments = {path for path in named(new_state.opt_state) if '/mu/' in path}
  of_group = {re.search('/mu/(.*?)/', path)[1] for path in moments}
  assert of_group == set(groups)
  num_trained = sum(len(named(state.params[group])) for group in groups)
  assert len(moments) == num_trained


def test_partition_and_merge_are_inverse():
  params = toy.params()
  trained, frozen = partition(params, r'^(encoder|projection)/')
  assert all(re.match('encoder|projection', name) for name in named(trained))
  assert set(named(trained)) | set(named(frozen)) == set(named(params))
  assert not set(named(trained)) & set(named(frozen))
  assert same_bits(merge(trained, frozen), params)


def test_frozen_weights_cost_no_weight_gradient():
  """Agreement 6: unfreezing adds one product a decoder weight, no more."""
  B, O, d = 4, 5, toy.MODEL.decoder
  T = 3 + 4 + O - 1  # prefix, chunks, and outputs but the last

  def cost(trainable):
    stage = dataclasses.replace(STAGES['reconstruct'], trainable=trainable)
    state = toy.state('reconstruct').replace(
      opt_state=init_opt_state(toy.params(), stage)
    )
    run = functools.partial(
      train_step, model=toy.model(), stage=stage, cfg=toy.stage(), variant=None
    )
    return flops.count(jax.make_jaxpr(run)(state, toy.batch(B, O=O), KEY, 0.1))

  heads = (2 * d.num_heads + 2 * d.num_kv_heads) * d.head_dim
  layer = d.width * heads + 3 * d.width * d.mlp_width
  weight_gradients = (
    2 * B * (T * d.num_layers * layer + O * d.width * d.vocab_size)
  )
  frozen = cost(r'^(encoder|projection)/')
  assert cost(compressed.ALL_BUT_POLICY) - frozen == weight_gradients


@pytest.mark.parametrize('name', ['lm', 'cpt'])
def test_accumulation_changes_memory_and_not_the_result(name):
  """Four pieces with unequal numbers of targets against one batch."""
  batch = toy.step_batch(name)
  whole, metrics = toy.step(name)(toy.state(name), batch)
  if name == 'cpt':
    assert float(metrics['targets']) == batch['output_len_B'].sum()
  pieces, piece_metrics = toy.step(name, 4)(toy.state(name), batch)
  for key in ('loss', 'targets', 'grad_norm'):
    np.testing.assert_allclose(piece_metrics[key], metrics[key], rtol=1e-5)
  assert toy.distance(whole.params, pieces.params) < 1e-5


@pytest.mark.parametrize('name', ['mixed', 'grpo'])
@pytest.mark.parametrize('pieces', [pytest.param(2, marks=pytest.mark.slow), 4])
def test_draws_belong_to_the_row_and_not_to_its_piece(name, pieces):
  """What is drawn within a step is the same in however many pieces."""
  batch = toy.step_batch(name)
  whole, metrics = toy.step(name)(toy.state(name), batch)
  parts, of_parts = toy.step(name, pieces)(toy.state(name), batch)
  for key in metrics:  # of grpo rewards, entropy and what was chosen as well
    np.testing.assert_allclose(
      of_parts[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key
    )
  assert toy.distance(whole.params, parts.params) < 1e-5


def scalar_step(loss, value, updates=1):
  """A step on one parameter w; `loss` is a function of w alone."""
  nll = lambda model, params, *_: (loss(params['w']), jnp.float32(1))
  stage = Stage('toy', predecessor=None, trainable='.*', task=None, nll=nll)
  state = TrainState(jnp.int32(7), {'w': jnp.float32(value)}, None)
  state = state.replace(opt_state=init_opt_state(state.params, stage))
  new_state, metrics = train_step(
    state, {'x_B': jnp.zeros(1)}, KEY, jnp.float32(0.5), model=toy.model(),
    stage=stage, cfg=toy.stage(updates_per_rollout=updates), variant=None,
  )  # fmt: skip
  return state, new_state, metrics


def test_the_first_update_is_the_learning_rate_against_the_gradients_sign():
  """Adam's first direction; the clip at norm 1 cannot be seen in it."""
  _, state, metrics = scalar_step(lambda w: 3 * w**2, 2.0)
  assert float(state.params['w']) == pytest.approx(1.5, rel=1e-5)
  assert float(metrics['loss']) == 12.0
  assert float(metrics['grad_norm']) == 12.0  # before the clip
  mu = [x for name, x in named(state.opt_state).items() if '/mu/' in name]
  assert float(mu[0]) == pytest.approx(0.1)  # (1 - beta_1) * clipped gradient


@pytest.mark.parametrize(
  ('loss', 'value', 'updates'),
  [
    (lambda w: jnp.log(w), -1.0, 1),  # the loss
    (lambda w: jnp.exp(w), 1000.0, 1),
    (lambda w: jnp.sqrt(w), 0.0, 1),  # the gradient alone
    (lambda w: jnp.sqrt(w - 0.4), 0.5, 2),  # the second of two updates
  ],
)
def test_a_non_finite_step_leaves_the_state_as_it_was(loss, value, updates):
  """Agreement 13: parameters, moments and step count, bitwise."""
  state, new_state, metrics = scalar_step(loss, value, updates)
  assert not bool(metrics['finite'])
  assert same_bits(state, new_state)


@pytest.mark.parametrize('name', ['cpt', 'grpo'])
def test_one_nan_in_the_parameters_stops_a_real_step(name):
  """In `grpo` the NaN sits in a frozen group and comes in by the reward."""
  state = toy.state(name)
  head_DV = state.params['decoder']['lm_head'].at[0, 0].set(jnp.nan)
  params = state.params | {
    'decoder': state.params['decoder'] | {'lm_head': head_DV}
  }
  state = state.replace(params=params)
  new_state, metrics = toy.step(name)(state, toy.step_batch(name))
  assert not bool(metrics['finite'])
  assert same_bits(state, new_state)


def test_mixed_expands_t_prime_chunks_uniformly():
  """Chi-square over 5 places; an absent chunk is never chosen."""
  N, R = 20_000, 2
  chunk_len_BC = np.tile([[3, 3, 0, 3, 1, 3]], (N, 1))
  batch = {'chunk_len_BC': chunk_len_BC}
  expand_BC = np.asarray(
    compressed.expand_random(None, None, batch, row_keys(KEY, N), R, None)[
      'expand_BC'
    ]
  )
  assert (expand_BC.sum(1) == R).all()
  seen_C = expand_BC.sum(0)
  assert seen_C[2] == 0
  present_C = np.delete(seen_C, 2)
  expected = N * R / 5
  assert ((present_C - expected) ** 2 / expected).sum() < 18.5  # 99.9 %, 4 d.f.


def rollout(batch, G=4):
  """grpo's prepare, jitted: picks, rewards, advantages."""
  cfg = toy.stage(num_generations=G)
  run = toy.jit(
    lambda batch: grpo.rollout(
      toy.model(), toy.params(), batch, row_keys(KEY, 3), 2, cfg
    )
  )
  return run(batch)


def test_the_reward_is_minus_the_mean_nll_of_the_gold_output():
  batch, params = toy.batch(B=3), toy.params()
  rolled = rollout(batch)
  nll = toy.jit(
    lambda expand_BC: forward.output_nll(
      toy.model(), params, batch, rolled['c_BCE'], expand_BC, 2
    )
  )
  for g in range(4):
    nll_BO = np.asarray(nll(policy.to_mask(rolled['picks_BGR'][:, g], 4)))
    for b in range(3):
      gold_O = nll_BO[b, : batch['output_len_B'][b]]
      assert float(rolled['reward_BG'][b, g]) == pytest.approx(
        -gold_O.mean(), rel=1e-5
      )
  np.testing.assert_allclose(
    rolled['advantage_BG'],
    losses.group_advantage(rolled['reward_BG']),
    rtol=1e-5,
  )


def test_another_gold_output_has_another_reward_for_the_same_draws():
  batch = toy.batch(B=3)
  batch['output_len_B'][:], batch['loss_mask_BO'][:] = 5, True
  rolled = rollout(batch)
  permuted = rollout(batch | {'output_BO': batch['output_BO'][:, ::-1]})
  np.testing.assert_array_equal(rolled['picks_BGR'], permuted['picks_BGR'])
  assert (rolled['reward_BG'] != permuted['reward_BG']).all()


def test_rollouts_share_one_encoding():
  """Each further rollout costs the decoder alone, never the encoder."""
  batch, params = toy.batch(B=3), toy.params()
  cost = lambda f, *args: flops.count(jax.make_jaxpr(f)(*args))

  def rollouts(G):
    cfg = toy.stage(num_generations=G)
    return cost(
      lambda p: grpo.rollout(toy.model(), p, batch, row_keys(KEY, 3), 2, cfg),
      params,
    )

  encoded = cost(lambda p: forward.chunk_vectors(toy.model(), p, batch), params)
  c_BCE = np.zeros((3, 4, toy.MODEL.encoder.width), np.float32)
  scored = cost(
    lambda p: forward.policy_scores(toy.model(), p, batch, c_BCE), params
  )
  one = cost(
    lambda p: grpo.reward(toy.model(), p, batch, c_BCE, np.array([[0, 3]] * 3)),
    params,
  )
  assert rollouts(5) == encoded + scored + 5 * one


def test_before_the_first_update_the_surrogate_is_minus_the_mean_advantage():
  """Ratio 1 everywhere: nothing is clipped, and advantages sum to nothing."""
  rolled = rollout(toy.batch(B=3))
  cfg = toy.stage(clip_eps=1e-6)
  total, weight, metrics = toy.jit(
    lambda params: grpo.GRPO.loss(toy.model(), params, rolled, 2, cfg)
  )(toy.params())
  assert float(weight) == 3
  assert float(total) == pytest.approx(0, abs=1e-5)
  assert float(metrics['clip_fraction']) == 0
  assert float(metrics['expand_rate_C'].sum()) == pytest.approx(2)
