"""A planted choice: where expanding one known chunk pays, the policy finds it.

Twice: with a reward in closed form, and with the NLL of a small decoder that is
trained here, through the stages, on contexts of which one chunk holds the
answer. Either way the position is random and the policy sees only the c_i.

Dimension key: B contexts, C chunks, K chunk size, M encoder tokens of a chunk,
R draws, T row length.
"""

import dataclasses
import functools

import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from refrag_jax import optimizer
from refrag_jax.config import schema as config
from refrag_jax.models import policy
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.stages import STAGES, grpo
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, train_step

K, M = 4, 6
BOS, CLS, SEP, MARK, FIRST = 0, 1, 2, 3, 4  # FIRST: of the ordinary tokens
VOCAB = 36


def model_config(width: int, decoder_layers: int) -> config.ModelConfig:
  return config.ModelConfig(
    decoder=config.DecoderConfig(
      vocab_size=VOCAB,
      num_layers=decoder_layers,
      width=width,
      mlp_width=2 * width,
      num_heads=4,
      num_kv_heads=4,
      head_dim=width // 4,
      rope_theta=10_000.0,
      norm_eps=1e-5,
      tie_embeddings=True,
      **common.PLAIN_DECODER,
    ),
    encoder=config.EncoderConfig(
      vocab_size=VOCAB,
      num_layers=1,
      width=width,
      mlp_width=2 * width,
      num_heads=4,
      max_length=M,
      position_offset=0,
      norm_eps=1e-5,
      pooling='cls',
      **common.BERT,
    ),
    policy=config.PolicyConfig(
      num_layers=2,
      num_heads=4,
      mlp_width=2 * width,
      positions=True,
      rope_theta=10_000.0,
      norm_eps=1e-5,
    ),
    lora=config.LoraConfig(0, 0.0, 0.0, ()),
    chunk_size=K,
    compute_dtype='float32',
    attention='dense',
    remat='none',
    scan_layers=True,
    loss_block=0,
    piece_length=0,
  )


def stage_config(num_steps: int, batch_size: int, rate: float, **fields):
  values = {
    field.name: {int: 0, float: 0.0, str: ''}.get(field.type, ())
    for field in dataclasses.fields(config.StageConfig)
  }
  values |= dict(
    num_train_steps=num_steps,
    batch_size=batch_size,
    accumulation_steps=1,
    peak_learning_rate=rate,
    clip_eps=0.2,
  )
  return config.StageConfig(**(values | fields))


def fresh_model(decoder_layers: int):
  cfg = model_config(width=64, decoder_layers=decoder_layers)
  return cfg, init_params(cfg, jax.random.key(0))


def contexts(seed: tuple, B: int, C: int) -> dict:
  """Chunks of random tokens; one of each row is MARK v1 v2 v3.

  The output is MARK (given, no loss) and then v1 v2 v3.
  """
  rng = np.random.default_rng(seed)
  chunks_BCK = rng.integers(FIRST, VOCAB, (B, C, K))
  where_B = rng.integers(0, C, B)
  rows = np.arange(B)
  chunks_BCK[rows, where_B, 0] = MARK
  special = lambda token: np.full((B, C, 1), token)
  encoder_BCM = np.concatenate([special(CLS), chunks_BCK, special(SEP)], -1)
  full = lambda shape, value: np.full(shape, value, np.int32)
  return {
    'prefix_BQ': full((B, 1), BOS),
    'prefix_len_B': full(B, 1),
    'chunks_BCK': chunks_BCK.astype(np.int32),
    'chunk_len_BC': full((B, C), K),
    'encoder_BCM': encoder_BCM.astype(np.int32),
    'encoder_len_BC': full((B, C), M),
    'output_BO': chunks_BCK[rows, where_B].astype(np.int32),
    'output_len_B': full(B, K),
    'loss_mask_BO': np.broadcast_to(np.arange(K) > 0, (B, K)),
    'where_B': where_B.astype(np.int32),
  }


def as_rows(batch: dict) -> dict:
  """The same contexts as `lm` reads them: all tokens, the output behind."""
  B = len(batch['where_B'])
  tokens_BT = np.concatenate(
    [
      batch['prefix_BQ'],
      batch['chunks_BCK'].reshape(B, -1),
      batch['output_BO'],
    ],
    axis=1,
  )
  T = tokens_BT.shape[1]
  return {
    'tokens_BT': tokens_BT,
    'segment_ids_BT': np.ones_like(tokens_BT),
    'positions_BT': np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
  }


def train(cfg, name, params, stage_cfg, variant, batch_of_step) -> dict:
  """The parameters after the steps of a stage, made as train.py makes them."""
  stage = STAGES[name]
  step_fn = jax.jit(
    functools.partial(
      train_step, model=Refrag(cfg), stage=stage, cfg=stage_cfg, variant=variant
    ),
    donate_argnums=0,
  )
  state = TrainState(np.int32(0), params, init_opt_state(params, stage))
  state = jax.tree.map(jnp.array, state)  # a copy: the step takes it over
  steps, rate = stage_cfg.num_train_steps, stage_cfg.peak_learning_rate
  for step in range(steps):
    state, metrics = step_fn(
      state,
      batch_of_step(step),
      jax.random.fold_in(jax.random.key(7), step),
      np.float32(optimizer.learning_rate(step, steps, rate)),
    )
    assert bool(metrics['finite'])
  return state.params


def hit_rate(cfg, params, batch: dict) -> float:
  """How often the greedy policy's one pick is the marked chunk."""

  @jax.jit
  def pick(batch):
    model = Refrag(cfg)
    c_BCE = forward.chunk_vectors(model, params, batch)
    score_BC = forward.policy_scores(model, params, batch, c_BCE)
    return policy.greedy(score_BC, 1)[:, 0]

  return float((np.asarray(pick(batch)) == batch['where_B']).mean())


def grpo_stage(steps: int):
  return stage_config(steps, 64, 3e-3, num_generations=8, updates_per_rollout=2)


@pytest.mark.slow
def test_a_reward_in_closed_form(monkeypatch):
  """Expanding the marked chunk pays 1, any other nothing; encoder random."""

  def reward(model, params, batch, c_BCE, picks_BR):
    del model, params, c_BCE
    return (picks_BR == batch['where_B'][:, None]).any(1).astype(jnp.float32)

  # `rollout` looks it up at each call, so the stage itself stays as it is.
  monkeypatch.setattr(grpo, 'reward', reward)
  cfg, params, C = *fresh_model(decoder_layers=1), 8
  unseen = contexts((9,), 512, C)
  assert hit_rate(cfg, params, unseen) < 0.25
  params = train(
    cfg, 'grpo', params, grpo_stage(100), 1,
    lambda step: contexts((0, step), 64, C),
  )  # fmt: skip
  assert hit_rate(cfg, params, unseen) >= 0.95


@pytest.mark.slow
def test_the_nll_of_a_trained_decoder():
  """`lm`, `mixed` and `grpo` in turn find the chunk that holds the answer.

  Its three values are drawn anew in each context, one of 32^3: the decoder must
  copy them from tokens, its chunk's vector does not hold them in this budget.
  """
  cfg, params, C = *fresh_model(decoder_layers=2), 6
  unseen = contexts((9,), 512, C)
  # Three chunks a row: more of its tokens can be predicted than of six.
  params = train(
    cfg, 'lm', params, stage_config(800, 64, 3e-3), None,
    lambda step: as_rows(contexts((1, step), 64, 3)),
  )  # fmt: skip
  params = train(
    cfg, 'mixed', params, stage_config(300, 64, 1e-3), 2,
    lambda step: contexts((2, step), 64, C),
  )  # fmt: skip

  @jax.jit
  def mean_nll(batch, pick_B):
    model = Refrag(cfg)
    c_BCE = forward.chunk_vectors(model, params, batch)
    return -grpo.reward(model, params, batch, c_BCE, pick_B[:, None]).mean()

  # That there is something to find, and that it was not found before.
  right = float(mean_nll(unseen, unseen['where_B']))
  wrong = float(mean_nll(unseen, (unseen['where_B'] + 1) % C))
  assert right + 1.0 < wrong
  assert hit_rate(cfg, params, unseen) < 0.3
  frozen = {name: params[name] for name in ('encoder', 'projection', 'decoder')}
  params = train(
    cfg, 'grpo', params, grpo_stage(150), 1,
    lambda step: contexts((3, step), 64, C),
  )  # fmt: skip
  hits = hit_rate(cfg, params, unseen)
  print(f'right {right:.3f} wrong {wrong:.3f} hits {hits:.3f}')
  assert hits >= 0.95
  jax.tree.map(
    np.testing.assert_array_equal, {n: params[n] for n in frozen}, frozen
  )
