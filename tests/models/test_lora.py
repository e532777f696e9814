"""Adapters: nothing at first, then a change that can be merged.

Dimension key: B batch, R rank.
"""

import dataclasses

import jax
import numpy as np
import pytest
import toy

from refrag_jax import sharding
from refrag_jax.models import lora
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, train_step


def nll(cfg, params):
  run = lambda params, batch: Refrag(cfg).apply(
    {'params': params}, batch, method=Refrag.compressed_nll
  )
  return np.asarray(toy.jit(run)(params, toy.batch(4)))


def test_untrained_they_change_no_bit():
  """And the other groups are drawn as without them."""
  key = jax.random.key(0)
  ours, plain = init_params(toy.LORA, key), init_params(toy.MODEL, key)
  adapters = ours.pop('lora')
  jax.tree.map(np.testing.assert_array_equal, ours, plain)
  np.testing.assert_array_equal(
    nll(toy.LORA, ours | {'lora': adapters}), nll(toy.MODEL, plain)
  )


@pytest.mark.parametrize('scan', [True, False])
def test_merged_they_do_the_same(scan):
  cfg = dataclasses.replace(toy.LORA, scan_layers=scan)
  params = toy.params(toy.LORA)
  merged = lora.merge(params, cfg.lora)
  assert 'lora' not in merged
  plain = {group: x for group, x in params.items() if group != 'lora'}
  found = nll(cfg, params)
  np.testing.assert_allclose(nll(toy.MODEL, merged), found, rtol=1e-5)
  assert np.abs(nll(toy.MODEL, plain) - found).max() > 0.1


@pytest.mark.parametrize('name', ['cpt', 'cpt_trained', 'mixed', 'sft'])
def test_a_step_trains_them_and_not_the_decoder(name):
  """Without moments of its own; what else a stage trains it trains as before."""
  variant, fields = toy.STEPS.get(name, (None, {}))
  stage, cfg = STAGES[name], toy.stage(**fields)
  params = toy.params(toy.LORA)
  trained, _ = stage.partition(params, cfg.freeze)
  state = TrainState(np.int32(0), params, init_opt_state(params, stage))
  run = lambda state, batch: train_step(
    state, batch, jax.random.key(0), 1e-2,
    model=Refrag(toy.LORA), stage=stage, cfg=cfg, variant=variant,
  )  # fmt: skip
  new, metrics = toy.jit(run)(state, toy.step_batch(name))
  assert bool(metrics['finite'])
  jax.tree.map(
    np.testing.assert_array_equal, new.params['decoder'], params['decoder']
  )
  for path, x in jax.tree_util.tree_leaves_with_path(new.params['lora']):
    old = params['lora']
    for key in path:
      old = old[key.key]
    assert np.abs(np.asarray(x - old)).max() > 1e-3, path
  moments = sum(x.size for x in jax.tree.leaves(new.opt_state[1].mu))
  assert moments == sum(x.size for x in jax.tree.leaves(trained))
  assert jax.tree.leaves(trained['decoder']) == []


def dropping(rate):
  of_lora = dataclasses.replace(toy.LORA.lora, dropout=rate)
  return dataclasses.replace(toy.LORA, lora=of_lora)


def test_what_dropout_keeps_is_as_much_in_the_mean():
  """Some numbers of each input are 0, the others larger by as much."""
  cfg = dropping(0.25).lora
  adapter = lora.Adapter((6, 5), 1, cfg)
  x = jax.random.normal(jax.random.key(0), (2, 3, 6))
  params = adapter.init(jax.random.key(1), x)
  params = jax.tree.map(lambda p: p + 0.5, params)
  apply = lambda key: adapter.apply(params, x, rngs={'dropout': key})
  drawn = jax.jit(jax.vmap(apply))(jax.random.split(jax.random.key(2), 4096))
  plain = adapter.apply(params, x)
  se = drawn.std(0) / 64
  assert np.abs((drawn.mean(0) - plain) / se).max() < 5
  assert se.min() > 1e-3


def test_dropout_is_of_training_steps_alone():
  """And drawn by the step's key, another one in every layer."""
  params, batch = toy.params(toy.LORA), toy.step_batch('cpt')
  np.testing.assert_array_equal(
    nll(dropping(0.5), params), nll(toy.LORA, params)
  )

  stage = STAGES['cpt']
  state = TrainState(np.int32(0), params, init_opt_state(params, stage))

  def steps(rate, pieces=1):
    model = Refrag(dropping(rate))
    run = toy.jit(
      lambda state, key: train_step(
        state, batch, key, 1e-2, model=model, stage=stage,
        cfg=toy.stage(accumulation_steps=pieces), variant=None,
      )
    )  # fmt: skip
    return lambda seed: float(run(state, jax.random.key(seed))[1]['loss'])

  plain, drops = steps(0.0), steps(0.5)
  assert plain(0) == plain(1)
  assert drops(0) == drops(0)
  seen = {plain(0), drops(0), drops(1)}
  assert len(seen) == 3
  assert steps(0.5, pieces=2)(0) not in seen


def test_every_layer_and_projection_draws_its_own(monkeypatch):
  seen = []

  def draw(self, x):
    key = jax.random.key_data(self.make_rng('dropout'))
    jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), key)
    return x

  monkeypatch.setattr(lora.nn.Dropout, '__call__', draw)
  model = lora.Dropping(Refrag(dropping(0.5)), jax.random.key(3))
  params, batch = toy.params(toy.LORA), toy.batch(2)
  run = lambda params, batch: model.apply(
    {'params': params}, batch, method=Refrag.compressed_nll
  )
  jax.block_until_ready(jax.jit(run)(params, batch))
  jax.effects_barrier()
  number = toy.LORA.decoder.num_layers * len(toy.LORA.lora.targets)
  assert len(seen) == len(set(seen)) == number


def test_a_stage_from_scratch_trains_the_decoder_itself():
  trained, _ = STAGES['lm'].partition(toy.params(toy.LORA))
  assert jax.tree.leaves(trained['decoder']) and not jax.tree.leaves(
    trained['lora']
  )


def test_they_lie_as_what_they_change():
  """On each axis that they share with a kernel, on the mesh axes of it."""
  mesh = sharding.make_mesh(2, 2, 2)
  params = toy.params(toy.LORA)
  specs = jax.tree.map(lambda s: s.spec, sharding.infer_shardings(params, mesh))
  for name, (shape, num_in) in lora.shapes(toy.LORA.decoder).items():
    kernel = specs['decoder']['layers'][name]['kernel'][1:]
    adapter = specs['lora'][name]
    pad = lambda spec, n: (*spec, *(None,) * (n - len(spec)))
    a = pad(adapter['a']['kernel'][1:], num_in + 1)
    b = pad(adapter['b']['kernel'][1:], len(shape) - num_in + 1)
    assert (*a[:-1], *b[1:]) == pad(kernel, len(shape)), name
    assert a[-1] is None and b[0] is None
