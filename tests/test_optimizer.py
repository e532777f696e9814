"""The optimizer's settings do what they say, and the defaults change nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
import toy_run

from configs import common
from refrag_jax import compilation, optimizer, session
from refrag_jax.config import check
from refrag_jax.errors import UserError
from refrag_jax.stages import STAGES
from refrag_jax.step import init_opt_state


def settings(**fields):
  return dataclasses.replace(optimizer.DEFAULT, **fields)


def test_the_defaults_are_those_of_the_configs():
  values = common.base().optimizer.to_dict()
  assert dataclasses.asdict(optimizer.DEFAULT) == values
  assert tuple(optimizer.SCHEDULES) == check.SCHEDULES


def test_weight_decay_is_adamws_and_of_kernels_alone():
  params = {
    'kernel': jnp.full((2, 2), 3.0),
    'norm': {'scale': jnp.ones(2)},
    'bias': jnp.ones(2),
  }
  grads = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)

  def direction(cfg):
    tx = optimizer.make_tx(cfg)
    return tx.update(grads, tx.init(params), params)[0]

  plain, decayed = direction(settings()), direction(settings(weight_decay=0.2))
  added = jax.tree.map(lambda a, b: np.asarray(a - b), decayed, plain)
  np.testing.assert_allclose(added['kernel'], 0.6, rtol=1e-6)
  assert not added['norm']['scale'].any() and not added['bias'].any()
  theirs = optax.adamw(1.0, weight_decay=0.2)
  norm = optax.clip_by_global_norm(1.0)
  clipped, _ = norm.update(grads, norm.init(params))
  updates, _ = theirs.update(clipped, theirs.init(params), params)
  np.testing.assert_allclose(-updates['kernel'], decayed['kernel'], rtol=1e-5)


@pytest.mark.parametrize(
  ('schedule', 'middle', 'end'),
  [('cosine', 0.5, 0.0), ('linear', 0.5, 0.0), ('constant', 1.0, 1.0)],
)
def test_schedules(schedule, middle, end):
  cfg = settings(schedule=schedule, warmup_fraction=0.2)
  rate = [optimizer.learning_rate(s, 100, 2.0, cfg) / 2 for s in range(101)]
  np.testing.assert_allclose(rate[:20], np.arange(1, 21) / 20)
  assert rate[60] == pytest.approx(middle)
  assert rate[100] == pytest.approx(end, abs=1e-12)


def test_what_is_frozen_by_pattern_has_no_moments_and_stays():
  stage, params = STAGES['cpt'], toy.params()
  cfg = dataclasses.replace(toy.stage(), freeze='^decoder/embed_tokens')
  trained, frozen = stage.partition(params, cfg.freeze)
  assert trained['decoder']['embed_tokens'] is None
  assert frozen['decoder']['embed_tokens'] is not None
  state = init_opt_state(params, stage, cfg.freeze)
  moments = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  ]
  assert moments and not any('embed_tokens' in name for name in moments)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'optimizer__betas': (0.9,)}, 'two numbers'),
    ({'optimizer__betas': (0.9, 1.0)}, 'two numbers'),
    ({'optimizer__schedule': 'cosin'}, "there is no 'cosin'"),
    ({'optimizer__warmup_fraction': 1.5}, 'between 0 and 1'),
    ({'optimizer__clip_norm': 0.0}, 'greater than 0'),
    ({'optimizer__weight_decay': -1.0}, '0 or greater'),
    ({'stage__cpt__freeze': '('}, 'no regular expression'),
    ({'profile_steps': (3, 2)}, 'first and the last step'),
    ({'checkpoints_to_keep': 0}, 'greater than 0'),
  ],
)
def test_what_cannot_work_is_refused(changes, message):
  with pytest.raises(UserError, match=message) as e:
    toy_run.config('', **changes)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('freeze', 'message'),
  [
    ('.', 'leaves nothing to train'),
    ('^decoder/embed_token$', 'matches no parameter; they have paths such as'),
  ],
)
def test_a_pattern_that_freezes_all_or_nothing_is_refused(freeze, message):
  model = session.open_model(toy_run.config('', stage__cpt__freeze=freeze))
  with pytest.raises(UserError, match=re.escape(message)) as e:
    session.check_trains(model)
  assert '\n' not in str(e.value)


def test_a_fresh_state_is_that_of_the_config():
  """With its optimizer's parts, and without what the stage has frozen."""
  cfg = toy_run.config(
    '', optimizer__weight_decay=0.1, stage__cpt__freeze='^decoder/embed_tokens'
  )
  opened = session.open_model(cfg)
  params = session.abstract_params(opened)
  with jax.set_mesh(opened.mesh):
    abstract = compilation.abstract_state(opened, 'cpt')
    batch = compilation.abstract_batch(opened, 'cpt', 2)
    traced = compilation.trace_step(opened, 'cpt', abstract, batch, None)
  fresh = jax.eval_shape(
    lambda p: compilation.fresh_state(opened, 'cpt', p), params
  )
  after = traced.out_info[0]
  for state in (fresh, abstract):
    assert jax.tree.structure(state) == jax.tree.structure(after)
  paths = jax.tree_util.tree_leaves_with_path(fresh.opt_state)
  names = [jax.tree_util.keystr(path) for path, _ in paths]
  assert names and not any('embed_tokens' in name for name in names)
