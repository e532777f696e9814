"""Windows of text as the decoder and the encoder read them.

Dimension key: B windows, C chunks, K tokens of a chunk, M encoder tokens of a
chunk or a piece, P pieces, O output tokens.
"""

import numpy as np

from refrag_jax.config import check
from refrag_jax.config.schema import (
  Config,
  StageConfig,
  context_chunks,
  piece_tokens,
)
from refrag_jax.data import batch as batch_lib
from refrag_jax.data import chunking, curriculum, masked, tokenizers, windows
from refrag_jax.data.batch import Batch
from refrag_jax.data.tasks.task import Sampler, Shapes, Task
from refrag_jax.data.text.corpus import Corpus
from refrag_jax.errors import UserError

TABLE8_FACTORS = tuple(2**i for i in range(9))


class Continue(Task):
  """s tokens of context in chunks, then the o tokens behind them.

  With fewer chunks than s / k (a curriculum's factor) the context is the last
  ones before the output.

  Args:
    pieces: whether CEPE's pieces of the context are there as well.
  """

  def __init__(self, pieces: bool = False):
    self.pieces = pieces

  def check(self, config: Config, name: str) -> None:
    """Refuses pieces or a curriculum that the context cannot have."""
    cfg, prefix = config.stage[name], f'stage.{name}.'
    _check_context(cfg, prefix, config.model.chunk_size)
    if not self.regenerates:
      check.positive(cfg, prefix, 'output_length')
    if self.pieces:
      if not config.model.piece_length:
        raise UserError(
          f'config.model.piece_length is 0, but {name} reads pieces of so many '
          'tokens: set it, such as 256 (CEPE), or take the stage out'
        )
      check_pieces(config, name)
      if cfg.factors:
        raise UserError(
          f'config.{prefix}factors is {cfg.factors}: CEPE has no curriculum '
          'and reads whole pieces, use ()'
        )

  def check_text(self, config: Config, name: str, corpus: Corpus) -> None:
    documents = corpus.documents('heldout')
    what = f'held-out documents (stage {name})'
    self.table(config, name, corpus, documents, what)
    self._train_tables(config, name, corpus)

  def window_length(self, config: Config, name: str) -> int:
    return sum(self._lengths(config, name))

  def passes(self, config: Config, name: str, corpus: Corpus) -> float:
    cfg = config.stage[name]
    draws = cfg.num_train_steps * cfg.batch_size
    numbers = [t.num for t in self._train_tables(config, name, corpus)]
    return windows.passes(corpus.weights, numbers, draws)

  def num_chunks(self, config: Config, name: str) -> int:
    return config.stage[name].context_length // config.model.chunk_size

  def chunk_counts(self, config: Config, name: str) -> tuple[int, ...]:
    """How many chunks contexts have, over the curriculum; ascending."""
    return context_chunks(config.stage[name], config.model.chunk_size)

  def chunks_of_steps(self, config: Config, name: str, seed: int) -> np.ndarray:
    return curriculum.schedule(
      config.stage[name].num_train_steps,
      self.chunk_counts(config, name),
      seed,
    )

  def row_shapes(self, config: Config, name: str, num_chunks: int) -> Shapes:
    k, C = config.model.chunk_size, num_chunks
    output = C * k if self.regenerates else config.stage[name].output_length
    pieces = {}
    if self.pieces:
      pieces = batch_lib.shapes(
        batch_lib.PIECES,
        P=C * k // config.model.piece_length,
        M=piece_tokens(config),
      )
    M = config.data.max_encoder_tokens
    return pieces | context_shapes(Q=1, C=C, K=k, M=M, O=output)

  def sampler(
    self, config: Config, name: str, seed: int, corpus: Corpus
  ) -> Sampler:
    stage = config.stage[name]
    tables = self._train_tables(config, name, corpus)
    pattern = windows.mixture(corpus.weights)
    chunks_of_step = self.chunks_of_steps(config, name, seed)
    first_id = np.cumsum([0] + [t.num for t in tables])

    def sample(step: int, row_B: np.ndarray) -> Batch:
      n_B = step * stage.batch_size + row_B
      source_B, sample_B = windows.draw(
        pattern, [t.num for t in tables], n_B, seed
      )

      def parts():
        for source, table in enumerate(tables):
          mine = source_B == source
          if mine.any():
            part = self.cut(
              config,
              name,
              corpus,
              table,
              sample_B[mine],
              int(chunks_of_step[step]),
            )
            part['id_B'] += np.int32(first_id[source])
            yield mine, part

      return self.finish(config, batch_lib.join(len(row_B), parts()), n_B, seed)

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
    documents = corpus.documents('heldout')
    table = self.table(config, name, corpus, documents, 'held-out documents')
    n_B = windows.spread(table, num_rows, seed)
    num_chunks = num_chunks or self.chunk_counts(config, name)[-1]
    batch = self.cut(config, name, corpus, table, n_B, num_chunks)
    return self.finish(config, batch, n_B, seed)

  def table(
    self, config: Config, name: str, corpus: Corpus, docs, what: str
  ) -> windows.Windows:
    """The windows that these documents hold."""
    return windows.windows(corpus, docs, *self._lengths(config, name), what)

  def _lengths(self, config: Config, name: str) -> tuple[int, int]:
    """Tokens before the targets, and the targets."""
    stage = config.stage[name]
    if self.regenerates:
      return 0, stage.context_length
    return stage.context_length, stage.output_length

  def _train_tables(
    self, config: Config, name: str, corpus: Corpus
  ) -> list[windows.Windows]:
    return [
      self.table(
        config,
        name,
        corpus,
        corpus.documents('train', i),
        f'training documents of {source}',
      )
      for i, source in enumerate(corpus.sources)
    ]

  def cut(
    self, config: Config, name: str, corpus: Corpus, table, n_B, num_chunks: int
  ) -> Batch:
    """Windows `n_B` of a table with so many chunks of context."""
    stage = config.stage[name]
    context = num_chunks * config.model.chunk_size
    return cut(
      config,
      corpus,
      table,
      n_B,
      num_chunks,
      skip=stage.context_length - context,
      output_at=stage.context_length,
      output_length=stage.output_length,
      pieces=self.pieces,
    )

  def finish(
    self, config: Config, batch: Batch, key_B: np.ndarray, seed: int
  ) -> Batch:
    """What is done to a batch last; `key_B` and `seed` tell draws apart."""
    del config, key_B, seed
    return batch


class Regenerate(Continue):
  """A context in chunks whose output is the context itself."""

  regenerates = True

  def cut(
    self, config: Config, name: str, corpus: Corpus, table, n_B, num_chunks: int
  ) -> Batch:
    return cut(  # the first chunks, themselves
      config,
      corpus,
      table,
      n_B,
      num_chunks,
      skip=0,
      output_at=0,
      output_length=num_chunks * config.model.chunk_size,
      pieces=self.pieces,
    )


class Masked(Regenerate):
  """Windows for the encoder alone, whole and in chunks, some tokens hidden."""

  def row_shapes(self, config: Config, name: str, num_chunks: int) -> Shapes:
    C, M = num_chunks, config.data.max_encoder_tokens
    whole = ('whole_BM', 'whole_len_B', 'whole_target_BM')
    rest = (
      'encoder_BCM',
      'encoder_len_BC',
      'encoder_target_BCM',
      'doc_B',
      'id_B',
    )
    longest = min(M * C, config.model.encoder.max_length)
    return batch_lib.shapes(whole, M=longest) | batch_lib.shapes(rest, C=C, M=M)

  def cut(
    self, config: Config, name: str, corpus: Corpus, table, n_B, num_chunks: int
  ) -> Batch:
    doc_B, start_B = windows.locate(table, n_B)
    return masked.windows_twice(config, corpus, doc_B, start_B, num_chunks) | {
      'doc_B': doc_B.astype(np.int32),
      'id_B': n_B.astype(np.int32),
    }

  def finish(
    self, config: Config, batch: Batch, key_B: np.ndarray, seed: int
  ) -> Batch:
    """Hides tokens anew at every slot of the stream, so in every epoch."""
    tokenizer = tokenizers.load(config.data.encoder_tokenizer)
    return masked.mask(batch, key_B, seed, tokenizer)


def context_shapes(**sizes: int) -> Shapes:
  """The fields of prefix, chunks and output, with where a row comes from."""
  fields = (
    'prefix_BQ',
    'prefix_len_B',
    'chunks_BCK',
    'chunk_len_BC',
    'encoder_BCM',
    'encoder_len_BC',
    'encoder_cut_B',
    'output_BO',
    'output_len_B',
    'loss_mask_BO',
    'doc_B',
    'id_B',
  )
  return batch_lib.shapes(fields, **sizes)


def check_pieces(config: Config, name: str) -> None:
  """Refuses a stage's context that is no whole number of CEPE's pieces."""
  s, piece = config.stage[name].context_length, config.model.piece_length
  if piece and s % piece:
    raise UserError(
      f'config.stage.{name}.context_length {s} is not a multiple of '
      f'config.model.piece_length {piece}: use {max(s // piece, 1) * piece} or '
      f'{(s // piece + 1) * piece}'
    )


def _check_context(stage: StageConfig, prefix: str, k: int) -> None:
  check.positive(stage, prefix, 'context_length')
  s = stage.context_length
  if s % k != 0:
    raise UserError(
      f'config.{prefix}context_length {s} is not a multiple of '
      f'config.model.chunk_size {k}: use {max(s // k, 1) * k} or '
      f'{(s // k + 1) * k}'
    )
  for factor in stage.factors:
    if factor < 1:
      raise UserError(
        f'config.{prefix}factors holds {factor}: factors are counts of chunks, '
        '1 or more'
      )
  if stage.factors != tuple(sorted(set(stage.factors))):
    raise UserError(
      f'config.{prefix}factors {stage.factors}: give each once, ascending'
    )
  unknown = [f for f in stage.factors if f not in TABLE8_FACTORS]
  if len(stage.factors) > 1 and unknown:
    raise UserError(
      f'config.{prefix}factors holds {unknown[:1]}: a curriculum weighs the '
      f'factors of Table 8, {TABLE8_FACTORS}'
    )
  fits = [factor for factor in stage.factors if factor <= s // k]
  if stage.factors and not fits:
    raise UserError(
      f'config.{prefix}factors {stage.factors} are all above '
      f'context_length / chunk_size = {s // k}: add a smaller one'
    )


# --- Windows that no stage asks for: those of the evals ----------------------


def eval_windows(
  config: Config,
  corpus: Corpus,
  context_length: int,
  output_length: int,
  num_windows: int,
  split: str = 'heldout',
  seed: int = 0,
) -> Batch:
  """Windows of all held-out documents in turn, in the batch format.

  Fewer than `num_windows` if the documents hold no more.
  """
  docs = corpus.documents(split)
  table = windows.windows(
    corpus, docs, context_length, output_length, f'{split} documents'
  )
  n_B = windows.spread(table, num_windows, seed)
  piece = config.model.piece_length
  return cut(
    config,
    corpus,
    table,
    n_B,
    num_chunks=context_length // config.model.chunk_size,
    skip=0,
    output_at=context_length,
    output_length=output_length,
    # Some evals have several lengths, and CEPE reads whole pieces.
    pieces=piece > 0 and context_length % piece == 0,
  )


def reconstruction_windows(
  config: Config,
  corpus: Corpus,
  length: int,
  num_windows: int,
  split: str = 'heldout',
  seed: int = 0,
) -> Batch:
  """Windows whose output is their own context, in the batch format."""
  docs = corpus.documents(split)
  table = windows.windows(corpus, docs, 0, length, f'{split} documents')
  n_B = windows.spread(table, num_windows, seed)
  chunks = length // config.model.chunk_size
  return cut(config, corpus, table, n_B, chunks, 0, 0, length)


def reconstructions_at(
  config: Config,
  corpus: Corpus,
  doc_B: np.ndarray,
  start_B: np.ndarray,
  length: int,
) -> Batch:
  """As `reconstruction_windows`, from given tokens of given documents."""
  docs = np.unique(doc_B)
  # Outputs of one token: so there is a window from every token on.
  table = windows.windows(corpus, docs, length - 1, 1)
  n_B = table.bounds[np.searchsorted(table.docs, doc_B)] + start_B
  chunks = length // config.model.chunk_size
  return cut(config, corpus, table, n_B, chunks, 0, 0, length)


def cut(
  config, corpus, table, n_B, num_chunks, skip, output_at, output_length,
  pieces=False,
) -> Batch:  # fmt: skip
  """Windows `n_B` as a batch; places are tokens from a window's begin."""
  tokenizer = tokenizers.load(config.data.tokenizer)
  doc_B, start_B = windows.locate(table, n_B)

  def context_in(number, size, max_encoder_tokens):
    return chunking.chunk_windows(
      corpus,
      doc_B,
      start_B + skip,
      number,
      size,
      tokenizers.load(config.data.encoder_tokenizer),
      max_encoder_tokens,
    )

  k, piece = config.model.chunk_size, config.model.piece_length
  batch, cut_BC = context_in(num_chunks, k, config.data.max_encoder_tokens)
  batch['encoder_cut_B'] = cut_BC.sum(1, dtype=np.int32)
  if pieces:
    whole, _ = context_in(num_chunks * k // piece, piece, piece_tokens(config))
    batch['piece_BPM'] = whole['encoder_BCM']
    batch['piece_len_BP'] = whole['encoder_len_BC']
  first_B = corpus.token_offsets[doc_B] + start_B + output_at
  token_BO = first_B[:, None] + np.arange(output_length)
  bos_B1 = np.full((len(n_B), 1), tokenizer.bos_id)
  batch |= batch_lib.plain(bos_B1, corpus.tokens[token_BO], doc_B)
  return batch | {'id_B': n_B.astype(np.int32)}
