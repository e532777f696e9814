"""Rows of plain text for the decoder's own pre-training (stage `lm`).

Dimension key: B rows, T row length.
"""

import numpy as np

from refrag_jax.config import check
from refrag_jax.config.schema import Config
from refrag_jax.data import batch as batch_lib
from refrag_jax.data import packing, tokenizers, windows
from refrag_jax.data.batch import Batch
from refrag_jax.data.tasks.task import Sampler, Shapes, Task
from refrag_jax.data.text.corpus import Corpus
from refrag_jax.errors import UserError


class PackedRows(Task):
  """Documents packed into rows of T tokens, and rows that repeat a span."""

  def check(self, config: Config, name: str) -> None:
    """Refuses a share of repeated spans that is none."""
    cfg, prefix = config.stage[name], f'stage.{name}.'
    check.positive(cfg, prefix, 'output_length')
    if not 0 <= cfg.periodic_fraction <= 1:
      raise UserError(
        f'config.{prefix}periodic_fraction is {cfg.periodic_fraction}: use a '
        'share of the windows between 0 and 1'
      )

  def settings(self, config: Config) -> dict:
    del config
    return {}

  def passes(self, config: Config, name: str, corpus: Corpus) -> float:
    cfg, length_D = config.stage[name], np.diff(corpus.token_offsets)
    # Rows that repeat a span take no text's turn.
    periodic = packing.periodic_before(cfg.batch_size, cfg.periodic_fraction)
    draws = cfg.num_train_steps * (cfg.batch_size - int(periodic))
    numbers = [
      length_D[corpus.documents('train', i)].sum() / (cfg.output_length - 1)
      for i in range(len(corpus.sources))
    ]
    return windows.passes(corpus.weights, numbers, draws)

  def num_chunks(self, config: Config, name: str) -> int:
    return 0

  def row_shapes(self, config: Config, name: str, num_chunks: int) -> Shapes:
    del num_chunks
    fields = ('tokens_BT', 'segment_ids_BT', 'positions_BT', 'doc_B')
    return batch_lib.shapes(fields, T=config.stage[name].output_length)

  def sampler(
    self, config: Config, name: str, seed: int, corpus: Corpus
  ) -> Sampler:
    stage = config.stage[name]
    tokenizer = tokenizers.load(config.data.tokenizer)
    tables = [
      packing.pack(corpus, corpus.documents('train', i), stage.output_length)
      for i in range(len(corpus.sources))
    ]
    pattern = windows.mixture(corpus.weights)
    share = stage.periodic_fraction
    num_periodic = int(packing.periodic_before(stage.batch_size, share))
    num_text = stage.batch_size - num_periodic

    def sample(step: int, row_B: np.ndarray) -> Batch:
      repeat_B = packing.is_periodic(row_B, share)
      before_B = packing.periodic_before(row_B, share)
      # Periodic rows take no text's turn: every piece is seen once an epoch.
      n_B = np.where(
        repeat_B,
        step * num_periodic + before_B,
        step * num_text + row_B - before_B,
      )
      source_B, sample_B = windows.draw(
        pattern, [t.num for t in tables], n_B, seed
      )

      def parts():
        for source, table in enumerate(tables):
          mine = (source_B == source) & ~repeat_B
          if mine.any():
            yield (
              mine,
              packing.fill_rows(
                corpus,
                table,
                sample_B[mine],
                tokenizer.bos_id,
                tokenizer.pad_id,
              ),
            )
          mine = (source_B == source) & repeat_B
          if mine.any():
            yield (
              mine,
              packing.periodic_rows(
                corpus, table, n_B[mine], tokenizer.bos_id, seed
              ),
            )

      return batch_lib.join(len(row_B), parts())

    return sample

  def heldout_batch(
    self,
    config: Config,
    name: str,
    corpus: Corpus,
    num_rows: int,
    seed: int = 0,
    num_chunks: int = 0,
  ) -> Batch:
    """Whole pieces of one document each: errors are over documents."""
    del num_chunks
    length = config.stage[name].output_length
    tokenizer = tokenizers.load(config.data.tokenizer)
    table = windows.windows(
      corpus,
      corpus.documents('heldout'),
      0,
      length - 1,
      'held-out documents',
    )
    n_B = windows.spread(table, num_rows, seed)
    doc_B, start_B = windows.locate(table, n_B)
    tokens_BT = np.full((len(n_B), length), tokenizer.bos_id, np.int32)
    first_B = corpus.token_offsets[doc_B] + start_B
    tokens_BT[:, 1:] = corpus.tokens[first_B[:, None] + np.arange(length - 1)]
    positions_T = np.arange(length, dtype=np.int32)
    return {
      'tokens_BT': tokens_BT,
      'segment_ids_BT': np.ones_like(tokens_BT),
      'positions_BT': np.broadcast_to(positions_T, tokens_BT.shape),
      'doc_B': doc_B.astype(np.int32),
    }
