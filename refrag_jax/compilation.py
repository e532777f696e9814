"""Ahead-of-time compilation: a stage's step programs, one a shape and variant.

Everything is compiled before the first step, so that compile time is known and
apart, and a shape that nobody planned is an error instead of a recompilation.
"""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import flops, sharding
from refrag_jax.config.schema import ModelConfig
from refrag_jax.models.refrag import Refrag
from refrag_jax.runtime.progress import say
from refrag_jax.session import Session, abstract_params, with_shardings
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, train_step


class Programs(NamedTuple):
  """What runs at each step; arrays are indexed by step."""

  compiled: dict[Any, Any]  # (chunks, variant) -> executable
  key_of_step: list[Any]
  flops_of_step: np.ndarray  # of the model, nothing twice; all devices
  tokens_of_step: np.ndarray  # text tokens of one step, all devices
  compile_s: float

  def of_step(self, step: int):
    return self.compiled[self.key_of_step[step]]


def compile_stage(
  session: Session,
  name: str,
  state: TrainState,
  start: int,
  between: Callable[[], None] = lambda: None,
) -> Programs:
  """Compiles what steps `start`.. need.

  Args:
    state: may be abstract.
    between: called between two programs; what it raises ends it here, without
      those that are not begun.
  """
  clock = time.monotonic()
  key_of_step = step_keys(session, name)
  keys = dict.fromkeys(key_of_step[start:])
  say(f'{name}  compiling {len(keys)} step program{"s" * (len(keys) != 1)}')
  traced, tokens = {}, {}
  for key in keys:
    batch = abstract_batch(session, name, key[0])
    traced[key] = trace_step(session, name, state, batch, key[1])
    tokens[key] = text_tokens(batch)
    between()
  # XLA compiles outside the interpreter lock; tracing must stay in here. Large
  # programs take gigabytes each while they are compiled.
  with concurrent.futures.ThreadPoolExecutor(
    min(4, os.cpu_count() or 1)
  ) as pool:
    futures = {
      key: pool.submit(lambda low: low.compile(), t.lower())
      for key, t in traced.items()
    }
    compiled = {}
    try:
      for key, future in futures.items():
        compiled[key] = future.result()
        between()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  plain = plain_model(session.config.model) == session.config.model
  cost = {
    key: flops.count(t.jaxpr)
    if plain
    else model_flops(session, name, state, key)
    for key, t in traced.items()
  }
  return Programs(
    compiled,
    key_of_step,
    np.array([cost.get(key, 0) for key in key_of_step], np.float64),
    np.array([tokens.get(key, 0) for key in key_of_step], np.float64),
    time.monotonic() - clock,
  )


def fresh_state(session: Session, name: str, params: dict) -> TrainState:
  """The state of a stage that starts from these parameters."""
  config = session.config
  freeze, optim = config.stage[name].freeze, config.optimizer
  opt_state = init_opt_state(params, STAGES[name], freeze, optim)
  return TrainState(np.int32(0), params, opt_state)


def abstract_state(session: Session, name: str) -> TrainState:
  """Shapes and shardings of a stage's state; nothing is allocated."""
  state = jax.eval_shape(
    lambda params: fresh_state(session, name, params), abstract_params(session)
  )
  return with_shardings(state, session.mesh)


def trace_step(
  session: Session, name: str, state: TrainState, batch: dict, variant: Any
):
  """The stage's step, traced; it donates the state.

  What shapes it is static, so that JAX finds a program that this process has
  traced before: another arm's, or that of a stage which goes on.
  """
  static = {
    'model': session.model,
    'stage': STAGES[name],
    'cfg': session.config.stage[name],
    'variant': variant,
    'optim': session.config.optimizer,
  }
  step = jax.jit(
    train_step,
    static_argnames=tuple(static),
    donate_argnums=0,
    out_shardings=(sharding.infer_shardings(state, session.mesh), None),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  rate = jax.ShapeDtypeStruct((), np.float32)
  return step.trace(state, batch, key, rate, **static)


def plain_model(model: ModelConfig) -> ModelConfig:
  """The same model, which computes nothing twice."""
  return dataclasses.replace(
    model, remat='none', attention='dense', loss_block=0
  )


def model_flops(
  session: Session, name: str, state: TrainState, key: tuple[int, Any]
) -> int:
  """FLOPs of a step that recomputes nothing: what MFU is of."""
  plain = session._replace(model=Refrag(plain_model(session.config.model)))
  batch = abstract_batch(session, name, key[0])
  with jax.set_mesh(session.mesh):
    return flops.count(trace_step(plain, name, state, batch, key[1]).jaxpr)


def abstract_batch(session: Session, name: str, num_chunks: int) -> dict:
  """Shapes of a stage's global batch with so many chunks."""
  rows = session.config.stage[name].batch_size
  shapes = STAGES[name].task.row_shapes(session.config, name, num_chunks)
  return {
    key: jax.ShapeDtypeStruct(
      (rows, *shape), dtype, sharding=sharding.batch_sharding(session.mesh)
    )
    for key, (shape, dtype) in shapes.items()
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
  seed = STAGES[name].seed(session.config) & 0xFFFFFFFF
  return jax.random.fold_in(jax.random.key(seed), step)


def step_keys(session: Session, name: str) -> list[tuple[int, Any]]:
  """(chunks, variant) of every step of a stage, on the host."""
  cfg, stage = session.config.stage[name], STAGES[name]
  seed = stage.seed(session.config)
  keys = []
  for step, chunks in enumerate(stage.chunks_of_steps(session.config)):
    variants = stage.context.variants(cfg, int(chunks))
    # Drawn, not cycled: a cycle could lock in step with the curriculum.
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    keys.append((int(chunks), variants[rng.integers(len(variants))]))
  return keys
