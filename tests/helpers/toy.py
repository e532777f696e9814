"""A model of toy sizes and random ragged batches, for the tests of the core.

Dimension key: B batch, Q prefix slots, C chunks, K chunk size, P pieces, M
encoder tokens of a chunk or piece, O output slots.

No number here is a usual default (RoPE's base, the epsilons), so that a module
that does not read its config is seen; no parameter is 0 or 1 everywhere, so
that one which nobody uses is seen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from refrag_jax import optimizer
from refrag_jax.config.check import LORA_TARGETS
from refrag_jax.config.schema import (
  DecoderConfig,
  EncoderConfig,
  LoraConfig,
  ModelConfig,
  PolicyConfig,
  StageConfig,
)
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, train_step

K, M = 3, 5  # chunk size; encoder tokens of a chunk, CLS and SEP included

MODEL = ModelConfig(
  decoder=DecoderConfig(
    vocab_size=40,
    num_layers=2,
    width=16,
    mlp_width=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=50.0,
    norm_eps=1e-3,
    tie_embeddings=False,
    **common.PLAIN_DECODER,
  ),
  encoder=EncoderConfig(
    vocab_size=24,
    num_layers=2,
    width=8,
    mlp_width=12,
    num_heads=2,
    max_length=6,
    position_offset=2,
    norm_eps=1e-3,
    pooling='cls',
    **common.BERT,
  ),
  policy=PolicyConfig(
    num_layers=2,
    num_heads=2,
    mlp_width=12,
    positions=True,
    rope_theta=50.0,
    norm_eps=1e-3,
  ),
  lora=LoraConfig(rank=0, alpha=8.0, dropout=0.0, targets=LORA_TARGETS),
  chunk_size=K,
  piece_length=0,
  compute_dtype='float32',
  attention='dense',
  remat='none',
  scan_layers=True,
  loss_block=0,
)

# With the fifth parameter group; the other four are drawn as without it.
CEPE = dataclasses.replace(MODEL, piece_length=4)
LORA = dataclasses.replace(MODEL, lora=dataclasses.replace(MODEL.lora, rank=2))


def jit(f, **kwargs):
  """jax.jit, in one place for the tests of the core."""
  return jax.jit(f, **kwargs)


def replace(group: str, **fields) -> ModelConfig:
  """MODEL with other fields in one of its groups."""
  changed = dataclasses.replace(getattr(MODEL, group), **fields)
  return dataclasses.replace(MODEL, **{group: changed})


def model(cfg: ModelConfig = MODEL) -> Refrag:
  return Refrag(cfg)


@functools.cache
def params(cfg: ModelConfig = MODEL, seed: int = 0) -> dict:
  """Random parameters, biases and norm scales included."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  cross = {'cross': shapes.pop('cross')} if cfg.piece_length else {}

  def draw(path, shape):
    x = 0.3 * rng.standard_normal(shape.shape)
    x += path_str(path).endswith('scale')
    return jnp.asarray(x, jnp.float32)

  drawn = jax.tree_util.tree_map_with_path(draw, shapes)
  return drawn | jax.tree_util.tree_map_with_path(draw, cross)


@functools.cache  # each shape compiles once
def method(name: str, cfg: ModelConfig = MODEL):
  """A jitted method of the model: f(params, *arrays)."""
  apply = functools.partial(Refrag(cfg).apply, method=name)
  return jit(lambda params, *args: apply({'params': params}, *args))


def batch(B: int, C: int = 4, Q: int = 3, O: int = 5, seed: int = 0) -> dict:
  """Ragged rows in the pipeline's format; no slot of a padding id is 0.

  Each row has a short prefix and output, the last chunk of each row is short,
  and from three chunks on one in the middle is absent. Of the three pieces one
  is absent in each row, and all of them in the last.
  """
  rng = np.random.default_rng(seed)
  ids = lambda vocab, *shape: rng.integers(1, vocab, shape).astype(np.int32)
  decoder, encoder = MODEL.decoder.vocab_size, MODEL.encoder.vocab_size
  chunk_len_BC = np.full((B, C), K, np.int32)
  encoder_len_BC = rng.integers(3, M + 1, (B, C)).astype(np.int32)
  if C > 2:
    absent_B = rng.integers(1, C - 1, B)
    chunk_len_BC[np.arange(B), absent_B] = 0
    encoder_len_BC[np.arange(B), absent_B] = 0
  if C:
    chunk_len_BC[:, -1] = rng.integers(1, K, B)
  output_len_B = rng.integers(2, O + 1, B).astype(np.int32)
  P, piece_M = 3, MODEL.encoder.max_length
  out = {
    'prefix_BQ': ids(decoder, B, Q),
    'prefix_len_B': rng.integers(1, Q + 1, B).astype(np.int32),
    'chunks_BCK': ids(decoder, B, C, K),
    'chunk_len_BC': chunk_len_BC,
    'encoder_BCM': ids(encoder, B, C, M),
    'encoder_len_BC': encoder_len_BC,
    'output_BO': ids(decoder, B, O),
    'output_len_B': output_len_B,
    'loss_mask_BO': np.arange(O)[None] < output_len_B[:, None],
    'doc_B': np.arange(B, dtype=np.int32),
    'id_B': np.arange(B, dtype=np.int32),
    'piece_BPM': ids(encoder, B, P, piece_M),
    'piece_len_BP': rng.integers(3, piece_M + 1, (B, P)).astype(np.int32),
  }
  out['piece_len_BP'][np.arange(B), rng.integers(0, P, B)] = 0
  out['piece_len_BP'][-1] = 0
  return out


def lm_batch(B: int, T: int = 12, seed: int = 0) -> dict:
  """Rows of two packed segments each, with padding behind."""
  rng = np.random.default_rng(seed)
  segment_BT = np.zeros((B, T), np.int32)
  position_BT = np.zeros((B, T), np.int32)
  for b in range(B):
    cut, end = rng.integers(2, T // 2), rng.integers(T // 2 + 2, T + 1)
    segment_BT[b, :end] = 1 + (np.arange(end) >= cut)
    position_BT[b] = np.arange(T) - cut * (segment_BT[b] == 2)
  tokens_BT = rng.integers(1, MODEL.decoder.vocab_size, (B, T))
  return {
    'tokens_BT': tokens_BT.astype(np.int32),
    'segment_ids_BT': segment_BT,
    'positions_BT': position_BT,
    'doc_B': np.arange(B, dtype=np.int32),
  }


def stage(**fields) -> StageConfig:
  """A stage's config; what is not named is 0 or ()."""
  values = {
    field.name: {int: 0, float: 0.0, str: ''}.get(field.type, ())
    for field in dataclasses.fields(StageConfig)
  }
  values |= {'num_train_steps': 4, 'batch_size': 8, 'accumulation_steps': 1}
  return StageConfig(**(values | fields))


# What a stage's step runs on: its variant, and what its config adds. `sft` is
# `cpt` with other batches, the other control arms are `cpt_trained`.
STEPS = {
  'lm': (None, {}),
  'reconstruct': (None, {}),
  'cpt': (None, {}),
  'mixed': (2, {}),
  'grpo': (
    2,
    {'num_generations': 4, 'clip_eps': 0.2, 'updates_per_rollout': 2},
  ),
  'cpt_trained': ('full', {}),
  'cepe': (None, {}),
}

# Adam divides by a gradient's size: one that is zero but for rounding (a bias of
# all keys, which a softmax does not see) would become a step of its own, and two
# ways to the same gradients end apart. The median gradient is 300 times 1e-5.
OPTIM = dataclasses.replace(optimizer.DEFAULT, eps=1e-5)


def model_of(name: str, **fields) -> ModelConfig:
  cfg = CEPE if name == 'cepe' else MODEL
  return dataclasses.replace(cfg, **fields)


def state(name: str) -> TrainState:
  start = params(model_of(name))
  return TrainState(jnp.int32(0), start, init_opt_state(start, STAGES[name]))


def step_batch(name: str, B: int = 8) -> dict:
  return lm_batch(B) if name == 'lm' else batch(B)


@functools.cache  # each stage compiles once
def step(name: str, accumulation_steps: int = 1, attention: str = 'dense'):
  """A stage's jitted step: f(state, batch) -> state, metrics."""
  variant, fields = STEPS[name]
  run = functools.partial(
    train_step,
    model=model(model_of(name, attention=attention)),
    stage=STAGES[name],
    cfg=stage(accumulation_steps=accumulation_steps, **fields),
    variant=variant,
    optim=OPTIM,
  )
  return jit(lambda state, batch: run(state, batch, jax.random.key(0), 1e-2))


def tokens_of_row(batch: dict, b: int) -> tuple[list, list]:
  """Row b as the plain decoder reads it: ids before the output, output ids."""
  before = list(batch['prefix_BQ'][b, : batch['prefix_len_B'][b]])
  for ids_K, length in zip(batch['chunks_BCK'][b], batch['chunk_len_BC'][b]):
    before += list(ids_K[:length])
  return before, list(batch['output_BO'][b, : batch['output_len_B'][b]])


def distance(tree, other) -> float:
  """Global norm of the difference, in units of the first tree's norm."""
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  square = lambda xs: sum(float((np.asarray(x, float) ** 2).sum()) for x in xs)
  apart = [np.asarray(x, float) - np.asarray(y) for x, y in zip(leaves, others)]
  return (square(apart) / square(leaves)) ** 0.5
