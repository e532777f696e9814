"""A stage's compiled step programs: one per batch shape and variant.

Everything is compiled before the first step, so that compile time is known and
apart, and a shape that nobody planned is an error instead of a recompilation.
"""

import concurrent.futures
import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import flops, sharding
from refrag_jax.data import pipeline
from refrag_jax.session import Session
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import train_step


class Programs(NamedTuple):
  """What runs at each step; arrays are indexed by step."""

  compiled: dict[Any, Any]  # (chunks, variant) -> executable
  key_of_step: list[Any]
  flops_of_step: np.ndarray  # matrix products of one step, all devices
  tokens_of_step: np.ndarray  # text tokens of one step, all devices
  compile_s: float

  def of_step(self, step: int):
    return self.compiled[self.key_of_step[step]]


def compile_stage(
  session: Session, name: str, state: TrainState, start: int
) -> Programs:
  """Compiles what steps `start`.. need; `state` may be abstract."""
  config, cfg = session.config, session.config.stage[name]
  clock = time.monotonic()
  key_of_step = step_keys(session, name)
  first = {}
  for step in range(start, cfg.num_train_steps):
    first.setdefault(key_of_step[step], step)
  step_jit = jitted_step(session, name, state)
  sample = pipeline.sampler(config, name, session.corpus)
  traced, tokens = {}, {}
  for key, step in first.items():
    batch = abstract_batch(
      sample(step, np.arange(1)), cfg.batch_size, session.mesh
    )
    traced[key] = step_jit.trace(
      state, batch, jax.random.key(0), np.float32(0), variant=key[1]
    )
    tokens[key] = text_tokens(batch)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    # XLA compiles outside the interpreter lock; tracing must stay in here.
    lowered = {key: t.lower() for key, t in traced.items()}
    compiled = dict(
      zip(lowered, pool.map(lambda low: low.compile(), lowered.values()))
    )
  cost = {key: flops.count(t.jaxpr) for key, t in traced.items()}
  return Programs(
    compiled,
    key_of_step,
    np.array([cost.get(key, 0) for key in key_of_step], np.float64),
    np.array([tokens.get(key, 0) for key in key_of_step], np.float64),
    time.monotonic() - clock,
  )


def jitted_step(session: Session, name: str, state: TrainState):
  """The stage's step, to be traced with `variant` static; donates the state."""
  return jax.jit(
    functools.partial(
      train_step,
      model=session.model,
      stage=STAGES[name],
      cfg=session.config.stage[name],
    ),
    static_argnames='variant',
    donate_argnums=0,
    out_shardings=(sharding.infer_shardings(state, session.mesh), None),
  )


def abstract_batch(row: dict, batch_size: int, mesh) -> dict:
  """Shapes of the global batch from any one of its rows."""
  return {
    name: jax.ShapeDtypeStruct(
      (batch_size, *value.shape[1:]),
      value.dtype,
      sharding=sharding.batch_sharding(mesh),
    )
    for name, value in row.items()
  }


def text_tokens(batch: dict) -> int:
  """Tokens of text that a batch stands for, compressed or not."""
  if 'tokens_BT' in batch:
    return batch['tokens_BT'].size
  if 'whole_BM' in batch:  # the encoder's; the chunks are the same text
    return batch['whole_BM'].size
  return batch['chunks_BCK'].size + batch['output_BO'].size


def step_key(session: Session, name: str, step: int) -> jax.Array:
  """The key of a step: a pure function of (seed, stage, step)."""
  seed = pipeline.stream_seed(session.config, name) & 0xFFFFFFFF
  return jax.random.fold_in(jax.random.key(seed), step)


def step_keys(session: Session, name: str) -> list[tuple[int, Any]]:
  """(chunks, variant) of every step of a stage, on the host."""
  cfg, seed = (
    session.config.stage[name],
    pipeline.stream_seed(session.config, name),
  )
  keys = []
  for step, chunks in enumerate(_chunks_of_steps(session, name)):
    variants = STAGES[name].variants(cfg, int(chunks))
    # Drawn, not cycled: a cycle could lock in step with the curriculum.
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    keys.append((int(chunks), variants[rng.integers(len(variants))]))
  return keys


def _chunks_of_steps(session: Session, name: str) -> np.ndarray:
  cfg = session.config.stage[name]
  if name == 'lm' or name.startswith('sft'):
    data = session.config.data
    chunks = 0 if name == 'lm' else data.num_passages * data.passage_chunks
    return np.full(cfg.num_train_steps, chunks)
  return pipeline.factor_schedule(session.config, name)
