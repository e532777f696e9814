"""How a stage's decoder is given its context, and what varies over the steps.

A `variant` is what a step may do differently at a static shape: how many chunks
stay tokens, which context a control arm sees. The step number picks it, and
each variant compiles once per batch shape.
"""

import math
from typing import Any

from refrag_jax.config import check
from refrag_jax.config.schema import (
  Config,
  StageConfig,
  context_chunks,
  expanded_chunks,
)
from refrag_jax.errors import UserError


class Nothing:
  """No context, or one that is no part of the decoder's sequence."""

  def variants(self, cfg: StageConfig, num_chunks: int) -> tuple[Any, ...]:
    """What the steps of a stage vary in; every one is static."""
    del cfg, num_chunks
    return (None,)

  def positions(self, cfg: StageConfig, num_chunks: int, k: int) -> int:
    """Decoder positions of the longest context of so many chunks of k."""
    del cfg, num_chunks, k
    return 0

  def sampled(self, cfg: StageConfig, num_chunks: int) -> int | None:
    """Chunks that are tokens in the sample texts; None: there are no texts."""
    del cfg, num_chunks
    return None

  def reads(self, num_expanded: int) -> bool:
    """Whether chunks are read at all with so many of them as tokens."""
    del num_expanded
    return True

  def check(self, config: Config, name: str) -> None:
    """Raises UserError where the stage's section cannot work with this."""


class Chunks(Nothing):
  """One embedding a chunk."""

  def positions(self, cfg: StageConfig, num_chunks: int, k: int) -> int:
    del cfg, k
    return num_chunks

  def sampled(self, cfg: StageConfig, num_chunks: int) -> int | None:
    return self.variants(cfg, num_chunks)[-1] or 0


CHUNKS = Chunks()


class SomeExpanded(Chunks):
  """One embedding a chunk, but T' = floor(p L) chunks that stay tokens.

  A variant is T', one for each p of `expand_fractions`, without repeats.
  """

  def variants(self, cfg: StageConfig, num_chunks: int) -> tuple[int, ...]:
    draws = (expanded_chunks(p, num_chunks) for p in cfg.expand_fractions)
    return tuple(dict.fromkeys(draws))

  def positions(self, cfg: StageConfig, num_chunks: int, k: int) -> int:
    most = max(self.variants(cfg, num_chunks), default=0)
    return num_chunks + most * (k - 1)

  def check(self, config: Config, name: str) -> None:
    """Refuses shares but 0 < floor(p L) < L: else nothing is chosen."""
    stage, k = config.stage[name], config.model.chunk_size
    key = f'config.stage.{name}.expand_fractions'
    if not stage.expand_fractions:
      raise UserError(
        f'{key} is empty: name the share p of chunks to expand, such as (0.1,)'
      )
    for p in stage.expand_fractions:
      if not 0 < p < 1:
        raise UserError(f'{key} holds {p}: use shares between 0 and 1')
      for chunks in context_chunks(stage, k):
        fewest = math.ceil(1 / p - 1e-9)
        ways = [f'at least {fewest} chunks (context_length {fewest * k})']
        if chunks > 1:
          ways.insert(0, f'p of {_round_up(1 / chunks)} or more')
        if stage.factors:
          ways.append('no factors')
        if expanded_chunks(p, chunks) == 0:
          raise UserError(
            f'{key}: p = {p:g} of {chunks} chunks expands none of them '
            f'(floor(p L) = 0): use {", or ".join(ways)}'
          )


class Tokens(Nothing):
  """The context as tokens: none of it, the last ones, or all of it.

  A variant is one of the section's `contexts`.

  Args:
    known: those that are defined for this stage's contexts.
  """

  def __init__(self, known: tuple[str, ...] = check.CONTEXTS):
    self.known = known

  def variants(self, cfg: StageConfig, num_chunks: int) -> tuple[str, ...]:
    del num_chunks
    return cfg.contexts

  def positions(self, cfg: StageConfig, num_chunks: int, k: int) -> int:
    of = {'none': 0, 'last_k': num_chunks, 'full': num_chunks * k}
    return max(of[context] for context in cfg.contexts)

  def sampled(self, cfg: StageConfig, num_chunks: int) -> int | None:
    return {'none': 0, 'last_k': None, 'full': num_chunks}[cfg.contexts[-1]]

  def reads(self, num_expanded: int) -> bool:
    return num_expanded > 0

  def check(self, config: Config, name: str) -> None:
    """Refuses to draw from no contexts."""
    contexts, key = config.stage[name].contexts, f'stage.{name}.contexts'
    if not contexts:
      raise UserError(
        f'config.{key} is empty: name at least one of {", ".join(self.known)}'
      )
    check.known(contexts, self.known, key)


def _round_up(p: float) -> float:
  """The least p of three decimals that is not below `p`, for a message."""
  return math.ceil(p * 1000 - 1e-9) / 1000
