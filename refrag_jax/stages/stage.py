"""What a stage is: data, and pure functions of (params, batch, keys)."""

from collections.abc import Callable
from typing import NamedTuple

from refrag_jax.config.schema import StageConfig, expanded_chunks


def as_is(model, params, batch, keys_B, variant, cfg):
  """The `prepare` of stages whose batch is what the host made."""
  del model, params, keys_B, variant, cfg
  return batch


def one_variant(cfg: StageConfig, num_chunks: int) -> tuple:
  """The `variants` of stages that do the same at every step."""
  del cfg, num_chunks
  return (None,)


class Stage(NamedTuple):
  """One training stage; the loop in train.py runs any of them.

  A `variant` is what a step may do differently at a static shape (how many
  chunks stay tokens, which context a control arm sees); the step number picks
  it, and each variant compiles once per batch shape. Whatever is drawn belongs
  to a row and its key: pieces of a batch draw what the whole of it would.
  """

  predecessor: str | None  # the stage whose checkpoint it starts from
  trainable: str  # regex on parameter paths; the rest is frozen
  loss: Callable  # (model, params, batch, variant, cfg) -> sum, weight, metrics
  evaluate: Callable  # (model, params, batch, keys_B, variant, cfg) -> value_B
  prepare: Callable = (
    as_is  # (model, params, batch, keys_B, variant, cfg) -> batch
  )
  variants: Callable = (
    one_variant  # (cfg, num_chunks) -> tuple of static values
  )
  measures: str = 'loss'  # what `evaluate` returns: 'loss' or 'reward'


def expansion_variants(cfg: StageConfig, num_chunks: int) -> tuple[int, ...]:
  """T' for each configured p, without repeats."""
  draws = (expanded_chunks(p, num_chunks) for p in cfg.expand_fractions)
  return tuple(dict.fromkeys(draws))
