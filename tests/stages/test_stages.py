"""Each stage: one golden run of three steps, what it trains, how it expands."""

import functools

import forward
import jax
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import compilation, optimizer
from refrag_jax.config import schema as config
from refrag_jax.models.refrag import init_params
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES
from refrag_jax.stages.context import SomeExpanded
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, row_keys, train_step

REFRAG = ('encoder', 'projection', 'decoder')
# stage: the parameter groups that it trains
TRAINS = {
  'lm': ('decoder',),
  'mlm': ('encoder',),
  'reconstruct': ('encoder', 'projection'),
  'cpt': REFRAG,
  'mixed': REFRAG,
  'grpo': ('policy',),
  'sft': REFRAG,
  'cpt_trained': ('decoder',),
  'mixed_trained': ('decoder',),
  'sft_full': ('decoder',),
  'sft_none': ('decoder',),
  'reconstruct_unfrozen': REFRAG,
  'cpt_frozen': ('encoder', 'projection'),
  'cepe_warmup': ('encoder', 'cross'),
  'cepe': ('encoder', 'cross'),
  'cepe_unfrozen': ('encoder', 'cross', 'decoder'),
}
# Three steps on one batch from one set of parameters: the losses and the norms
# of the gradients; for `grpo` rewards, its loss is 0 on fresh rollouts.
GOLDEN = {
  'lm': (
    (6.09938, 5.98694, 5.87849),
    (1.55374, 1.50852, 1.45843),
  ),
  'mlm': (
    (5.58057, 5.51848, 5.46209),
    (1.46577, 1.45462, 1.39961),
  ),
  'reconstruct': (
    (6.15935, 5.95264, 5.85795),
    (18.99432, 9.51374, 4.72459),
  ),
  'cpt': (
    (6.03004, 5.57926, 5.49461),
    (17.75849, 4.60969, 8.18450),
  ),
  'mixed': (
    (6.06811, 5.76612, 5.58001),
    (22.29469, 9.93901, 7.80697),
  ),
  'grpo': (
    (-6.23834, -6.23834, -6.23834),
    (0.06538, 0.08169, 0.10277),
  ),
  'sft': (
    (5.91350, 5.56806, 5.33192),
    (16.63104, 6.80978, 8.01265),
  ),
  'cpt_trained': (
    (5.79582, 5.65881, 5.52932),
    (1.85276, 1.74471, 1.64642),
  ),
  'mixed_trained': (
    (5.80193, 5.66722, 5.53851),
    (1.89810, 1.82538, 1.74677),
  ),
  'sft_full': (
    (5.73872, 5.59870, 5.46323),
    (1.85992, 1.81516, 1.75484),
  ),
  'sft_none': (
    (5.76591, 5.61711, 5.47292),
    (2.01294, 1.96023, 1.87666),
  ),
  'reconstruct_unfrozen': (
    (6.15935, 5.86367, 5.69521),
    (19.08470, 11.07218, 5.19921),
  ),
  'cpt_frozen': (
    (6.03004, 5.65999, 5.65544),
    (17.65452, 6.71541, 8.75773),
  ),
  'cepe_warmup': (
    (5.93130, 5.75846, 5.64255),
    (7.28570, 4.19032, 3.57322),
  ),
  'cepe': (
    (6.17667, 5.98377, 5.87792),
    (6.64811, 3.88642, 3.27001),
  ),
  'cepe_unfrozen': (
    (6.17667, 5.87932, 5.69565),
    (6.96220, 3.89826, 3.76503),
  ),
}


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
  cfg = toy_run.config(folder, model__piece_length=4)
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


@pytest.fixture(scope='module')
def params(session):
  init = jax.jit(lambda key: init_params(session.config.model, key))
  return init(jax.random.key(0))


@pytest.fixture(scope='module')
def three_steps(session, params):
  """stage -> (metrics of each step, the state after the last)."""

  @functools.cache
  def run(name):
    stage, cfg = STAGES[name], session.config.stage[name]
    # The last step: late in a curriculum, so with several chunks.
    step = cfg.num_train_steps - 1
    batch = STAGES[name].sampler(session.config, session.corpus)(
      step, np.arange(cfg.batch_size)
    )
    chunks = batch['chunks_BCK'].shape[1] if 'chunks_BCK' in batch else 0
    step_fn = jax.jit(
      functools.partial(
        train_step,
        model=session.model,
        stage=stage,
        cfg=cfg,
        variant=stage.context.variants(cfg, chunks)[-1],
      )
    )
    state = TrainState(np.int32(0), params, init_opt_state(params, stage))
    metrics = []
    for _ in range(3):
      key = jax.random.key(0)
      state, last = step_fn(state, batch, key, np.float32(2e-3))
      metrics.append(jax.tree.map(np.asarray, last))
    return metrics, jax.tree.map(np.asarray, state)

  return run


@pytest.mark.parametrize('name', STAGES)
def test_golden_steps(three_steps, name):
  metrics, _ = three_steps(name)
  keys = ('reward' if name == 'grpo' else 'loss', 'grad_norm')
  got = [[round(float(m[key]), 5) for m in metrics] for key in keys]
  for values, golden, rtol in zip(got, GOLDEN[name], (1e-4, 2e-3), strict=True):
    np.testing.assert_allclose(
      values,
      golden,
      rtol,
      err_msg=f'{name}: three steps on a fixed batch from fixed parameters now '
      f'give other values of {keys}. If you did not intend to change '
      'behaviour, you have found a bug. If you did, put these into GOLDEN and say why in '
      f'the commit: {got}',
    )


@pytest.mark.parametrize('name', STAGES)
def test_what_a_stage_trains_changes_and_nothing_else(
  three_steps, params, name
):
  _, state = three_steps(name)
  old = dict(jax.tree_util.tree_leaves_with_path(params))
  changed = {}
  for path, new in jax.tree_util.tree_leaves_with_path(state.params):
    changed[path_str(path)] = not np.array_equal(new, old[path])
  for path, is_changed in changed.items():
    assert is_changed == (path.split('/')[0] in TRAINS[name]), path
  # Adam's two moments of a frozen group would cost twice its memory.
  moments = {
    path_str(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  for path, is_changed in changed.items():
    assert sum(m.endswith('/' + path) for m in moments) == 2 * is_changed


def test_every_stage_is_covered():
  assert TRAINS.keys() == STAGES.keys() == GOLDEN.keys()


def test_reconstruct_reads_its_frozen_decoder(session, params):
  stage, cfg = STAGES['reconstruct'], session.config.stage['reconstruct']
  batch = STAGES['reconstruct'].task.heldout_batch(
    session.config, 'reconstruct', session.corpus, 8
  )
  loss = jax.jit(
    lambda params: stage.evaluate(session.model, params, batch, None, None, cfg)
  )
  before_B = np.asarray(loss(params))
  for group, matters in (('decoder', True), ('policy', False)):
    moved = params | {
      group: jax.tree.map(lambda x: x * 1.1 + 0.01, params[group])
    }
    changes_B = np.abs(np.asarray(loss(moved)) - before_B) > 1e-6
    assert (changes_B == matters).all(), group


def test_reconstruct_predicts_its_own_chunks(session):
  batch = STAGES['reconstruct'].task.heldout_batch(
    session.config, 'reconstruct', session.corpus, 8
  )
  np.testing.assert_array_equal(
    batch['output_BO'], batch['chunks_BCK'].reshape(8, -1)
  )
  assert batch['loss_mask_BO'].all()


@pytest.mark.parametrize(
  ('fraction', 'chunks', 'expanded'),
  [
    (0.1, 8, 0),  # the paper's p of a tiny context is none
    (0.1, 10, 1),
    (0.1, 30, 3),  # 0.1 * 30 is 2.9999999999999996
    (0.29, 100, 29),
    (0.25, 7, 1),
    (1 / 15, 128, 8),  # Table 13: rate 8.258 with k = 16
    (1 / 15, 256, 17),  # and 8.0157
    (0.999, 8, 7),
  ],
)
def test_the_number_of_expanded_chunks_is_a_floor(fraction, chunks, expanded):
  assert config.expanded_chunks(fraction, chunks) == expanded


def test_variants_are_the_distinct_numbers_of_expanded_chunks(session):
  cfg = session.config.stage['grpo']  # p = 0.25 and 0.5
  expansions = SomeExpanded().variants
  assert expansions(cfg, 16) == (4, 8)
  assert expansions(cfg, 6) == (1, 3)
  assert expansions(cfg, 3) == (0, 1)
  assert STAGES['cpt_trained'].context.variants(
    session.config.stage['cpt_trained'], 4
  ) == ('none', 'last_k', 'full')
  assert STAGES['cpt'].context.variants(session.config.stage['cpt'], 4) == (
    None,
  )


def test_each_step_draws_its_variant_from_seed_and_step(session):
  long = toy_run.with_stage(session, 'cpt_trained', num_train_steps=900)
  keys = compilation.step_keys(long, 'cpt_trained')
  assert keys == compilation.step_keys(long, 'cpt_trained')
  variants = [variant for _, variant in keys]
  for context in ('none', 'last_k', 'full'):  # an equal mixture
    assert abs(variants.count(context) - 300) < 60
    # ... in each half of the curriculum
    assert abs(variants[:450].count(context) - 150) < 45
  other = compilation.step_keys(
    long._replace(config=toy_run.replaced(long.config, seed=1)), 'cpt_trained'
  )
  assert [variant for _, variant in other] != variants


def test_mixed_decodes_the_chunks_that_it_draws(session, params):
  """The loss is that of the drawn mask, and another draw is another loss."""
  stage, cfg = STAGES['mixed'], session.config.stage['mixed']
  batch = STAGES['mixed'].task.heldout_batch(
    session.config, 'mixed', session.corpus, 8
  )
  draw = lambda seed: stage.prepare(
    session.model, params, batch, row_keys(jax.random.key(seed), 8), 1, cfg
  )
  total = jax.jit(
    lambda batch: stage.loss(session.model, params, batch, 1, cfg)[0]
  )

  @jax.jit
  def direct(batch):
    c_BCE = forward.chunk_vectors(session.model, params, batch)
    return forward.output_nll(
      session.model, params, batch, c_BCE, batch['expand_BC'], 1
    ).sum()

  losses = [float(total(draw(seed))) for seed in (0, 1)]
  assert losses[0] != losses[1]
  np.testing.assert_allclose(losses[0], direct(draw(0)), rtol=1e-6)


def test_control_arms_read_text_and_no_encoder(session, params):
  """`last_k` keeps as many last tokens as there are chunks."""
  stage, cfg = STAGES['cpt_trained'], session.config.stage['cpt_trained']
  batch = STAGES['cpt_trained'].task.heldout_batch(
    session.config, 'cpt_trained', session.corpus, 8
  )
  C = batch['chunks_BCK'].shape[1]

  @functools.partial(jax.jit, static_argnums=1)
  def loss(batch, variant):
    return stage.evaluate(session.model, params, batch, None, variant, cfg)

  other = np.array(batch['chunks_BCK'])
  flat = other.reshape(8, -1)
  flat[:, :-C] = (flat[:, :-C] + 1) % 256  # all but the last C tokens
  changed = batch | {'chunks_BCK': other}
  no_encoder = batch | {
    key: np.zeros_like(batch[key]) for key in ('encoder_BCM', 'encoder_len_BC')
  }
  for variant, reads in (('none', False), ('last_k', False), ('full', True)):
    before_B = np.asarray(loss(batch, variant))
    np.testing.assert_array_equal(before_B, loss(no_encoder, variant))
    moved_B = np.asarray(loss(changed, variant)) != before_B
    assert (moved_B == reads).all(), variant
  flat[:, -C:] = (flat[:, -C:] + 1) % 256
  moved_B = np.asarray(loss(changed, 'last_k')) != loss(batch, 'last_k')
  assert moved_B.all()


def test_the_stage_chain():
  chain = {name: stage.predecessor for name, stage in STAGES.items()}
  assert chain == {
    'lm': None,
    'mlm': 'lm',
    'reconstruct': 'lm',
    'cpt': 'reconstruct',
    'mixed': 'cpt',
    'grpo': 'mixed',
    'sft': 'mixed',
    'cpt_trained': 'lm',
    'mixed_trained': 'cpt_trained',
    'sft_full': 'mixed_trained',
    'sft_none': 'mixed_trained',
    'reconstruct_unfrozen': 'lm',
    'cpt_frozen': 'reconstruct',
    'cepe_warmup': 'lm',
    'cepe': 'cepe_warmup',
    'cepe_unfrozen': 'cepe_warmup',
  }


def test_the_learning_rate_warms_up_over_4_percent_and_ends_at_0():
  rates = [optimizer.learning_rate(step, 100, 2.0) for step in range(100)]
  np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
  np.testing.assert_allclose(rates[52], 1.0)  # half of the cosine
  assert 0 < rates[99] < 1e-3
  assert sorted(rates[4:], reverse=True) == rates[4:]
