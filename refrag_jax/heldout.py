"""A stage's one fixed held-out batch, and its measure on it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from refrag_jax import sharding
from refrag_jax.config.schema import StageConfig
from refrag_jax.data import batch as batch_lib
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import Refrag
from refrag_jax.session import Session
from refrag_jax.stages import STAGES
from refrag_jax.stages.stage import Stage
from refrag_jax.step import map_pieces, row_keys

HELDOUT_ROWS = 256  # rows of the batch, where the documents hold so many


class Heldout(NamedTuple):
  """A stage's one fixed held-out batch and its measure on it."""

  batch: dict[str, np.ndarray]
  measure: Callable[[dict], np.ndarray]  # params -> float32 (B,)


def fixed_heldout(session: Session, name: str) -> Heldout:
  """The batch that a stage is measured on before, during and after.

  Where its steps come in variants, the measure is the mean over them. It runs
  in pieces of as many rows as a step holds at once, so that it needs no more
  memory than the step does.

  Raises:
    UserError: there are fewer held-out rows than devices.
  """
  cfg, stage = session.config.stage[name], STAGES[name]
  batch = stage.task.heldout_batch(
    session.config, name, session.corpus, HELDOUT_ROWS
  )
  ways = sharding.axis_size('batch', session.mesh)
  rows = len(batch['doc_B']) // ways * ways
  if not rows:
    raise UserError(
      f'stage {name}: the held-out documents give {len(batch["doc_B"])} rows, '
      f'fewer than the {ways} devices; raise data.heldout_fraction'
    )
  batch = batch_lib.take(batch, slice(rows))
  size = min(cfg.batch_size // cfg.accumulation_steps, rows)  # of a piece
  number = -(-rows // size)
  # The last piece is filled up, and what is too much is cut off again.
  index = np.minimum(np.arange(number * size), rows - 1).reshape(number, size)
  chunks = batch['chunks_BCK'].shape[1] if 'chunks_BCK' in batch else 0
  variants = stage.context.variants(cfg, chunks)

  pieces, row_AB = sharding.replicate(
    (batch_lib.take(batch, index), index), session.mesh
  )
  static = {
    'model': session.model,
    'stage': stage,
    'cfg': cfg,
    'variants': tuple(variants),
    'seed': session.config.seed,
    'rows': rows,
  }
  run = jax.jit(_measure, static_argnames=tuple(static))
  measure = lambda params: run(params, pieces, row_AB, **static)
  return Heldout(batch, lambda params: sharding.fetch(measure(params))[:rows])


def _measure(
  params: dict,
  pieces: dict,
  row_AB: jax.Array,
  *,
  model: Refrag,
  stage: Stage,
  cfg: StageConfig,
  variants: tuple,
  seed: int,
  rows: int,
) -> jax.Array:
  """The measure of the rows of A pieces of B rows each, (A * B,)."""

  def of_piece(args):
    return sum(
      stage.evaluate(model, params, *args, variant, cfg) for variant in variants
    ) / len(variants)

  keys_R = row_keys(jax.random.key(seed), rows)
  return map_pieces(of_piece, (pieces, keys_R[row_AB])).reshape(-1)


def chunks_cut(batch: dict[str, np.ndarray]) -> tuple[int, int]:
  """How many chunks exceed the encoder's cap, and how many there are."""
  if 'encoder_cut_B' not in batch:
    return 0, 0
  return int(batch['encoder_cut_B'].sum()), int(
    (batch['chunk_len_BC'] > 0).sum()
  )
