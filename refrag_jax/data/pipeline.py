"""Batches: what a stage sees at a step, as a pure function of (seed, step).

There is no iterator state to save: a run that resumes at step n asks for batch
n, and each process asks for its own rows of it. Control arms (`cpt_trained`)
draw the very windows, in the very order, of the stage they control; so does the
baseline CEPE, whose batches hold the context in pieces besides.

Dimension key: B rows, T row length, Q prefix, C chunks, K tokens of a chunk,
M encoder tokens of a chunk or piece, P pieces, O output tokens.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator

import grain
import numpy as np

from refrag_jax.config.schema import Config, context_chunks, piece_tokens
from refrag_jax.data import (
  chunking,
  curriculum,
  masked,
  tokenizers,
  windows,
)
from refrag_jax.data.text import corpus as corpus_lib

Batch = dict[str, np.ndarray]
# (step, row numbers) -> those rows of that step's batch.
Sampler = Callable[[int, np.ndarray], Batch]
# CEPE's stages: the stage of REFRAG whose windows each one reads.
CEPE = {'cepe_warmup': 'reconstruct', 'cepe': 'cpt', 'cepe_unfrozen': 'cpt'}
CONTROL = re.compile('_(trained|frozen|unfrozen)$')


def base_stage(stage_name: str) -> str:
  """Returns the stage that a control arm repeats: itself for the others."""
  return CEPE.get(stage_name) or CONTROL.sub('', stage_name)


def prepare_corpus(config: Config, cache_dir: str) -> corpus_lib.Corpus:
  """Returns the index of the run's own text."""
  return corpus_lib.prepare(
    config.data.text,
    config.data.weights,
    tokenizers.load(config.data.tokenizer),
    config.data.cache_dir or cache_dir,
    config.data.heldout_fraction,
  )


def stream_seed(config: Config, stage_name: str) -> int:
  """Returns the seed of a stage's samples; a control arm has its stage's."""
  name = f'{config.seed} {base_stage(stage_name)}'.encode()
  return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), 'little')


def factor_schedule(config: Config, stage_name: str) -> np.ndarray:
  """Returns the number of chunks of every step, int32[num_train_steps]."""
  return curriculum.schedule(
    config.stage[stage_name].num_train_steps,
    context_chunks(config.stage[stage_name], config.model.chunk_size),
    stream_seed(config, stage_name),
  )


def sampler(
  config: Config, stage_name: str, corpus: corpus_lib.Corpus
) -> Sampler:
  """Returns the function that makes any rows of any step's training batch."""
  if base_stage(stage_name) == 'lm':
    return _lm_sampler(config, stage_name, corpus)
  if stage_name.startswith('sft'):
    # The twins with full or no context see the same questions, too.
    seed = stream_seed(config, 'sft')
    return functools.partial(_questions(config, 'train').batch, seed)
  sample = _window_sampler(config, stage_name, corpus)
  if stage_name == 'mlm':
    return _masked_sampler(config, stage_name, sample)
  return sample


def row_shapes(
  config: Config, stage_name: str, num_chunks: int
) -> dict[str, tuple[tuple[int, ...], type]]:
  """What `sampler` gives, without any text: (shape of a row, dtype) by name.

  Args:
    num_chunks: C of the step; 0 for `lm`.
  """
  stage, data, k = (
    config.stage[stage_name],
    config.data,
    config.model.chunk_size,
  )
  ints = lambda *shape: (shape, np.int32)
  if base_stage(stage_name) == 'lm':
    names = ('tokens_BT', 'segment_ids_BT', 'positions_BT')
    length = stage.output_length
    return {**{name: ints(length) for name in names}, 'doc_B': ints()}
  C, M = num_chunks, data.max_encoder_tokens
  if stage_name == 'mlm':
    whole = min(M * C, config.model.encoder.max_length)
    return {
      'whole_BM': ints(whole),
      'whole_len_B': ints(),
      'whole_target_BM': ints(whole),
      'encoder_BCM': ints(C, M),
      'encoder_len_BC': ints(C),
      'encoder_target_BCM': ints(C, M),
      'doc_B': ints(),
      'id_B': ints(),
    }
  prefix, output = 1, stage.output_length
  if base_stage(stage_name) == 'reconstruct':
    output = C * k
  if stage_name.startswith('sft'):
    prefix, output = data.question_length, data.answer_length
  pieces = {}
  if stage_name in CEPE:
    piece = config.model.piece_length
    num = C * k // piece
    pieces['piece_BPM'] = ints(num, piece_tokens(config))
    pieces['piece_len_BP'] = ints(num)
  return pieces | {
    'prefix_BQ': ints(prefix),
    'prefix_len_B': ints(),
    'chunks_BCK': ints(C, k),
    'chunk_len_BC': ints(C),
    'encoder_BCM': ints(C, M),
    'encoder_len_BC': ints(C),
    'encoder_cut_B': ints(),
    'output_BO': ints(output),
    'output_len_B': ints(),
    'loss_mask_BO': ((output,), np.bool_),
    'doc_B': ints(),
    'id_B': ints(),
  }


def train_batches(
  config: Config,
  stage_name: str,
  corpus: corpus_lib.Corpus,
  start_step: int,
  rows: np.ndarray | None = None,
) -> Iterator[tuple[int, Batch]]:
  """Yields (step, rows of its batch) from `start_step` to the last step.

  Read ahead by grain in two threads: numpy and the tokenizers let go of the
  interpreter lock, and worker processes would need flags parsed and memory of
  their own.

  Args:
    rows: which of a batch's rows; None: all.
  """
  stage = config.stage[stage_name]
  rows = np.arange(stage.batch_size) if rows is None else rows
  source = _Steps(
    sampler(config, stage_name, corpus), rows, stage.num_train_steps
  )
  steps = grain.MapDataset.source(source).slice(slice(start_step, None))
  return iter(
    steps.to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )
  )


def check_text(
  config: Config, stage_name: str, corpus: corpus_lib.Corpus
) -> None:
  """Refuses text that a stage can cut no window from, before any is trained.

  Raises:
    UserError: all documents of one side, or of a source, are too short.
  """
  if base_stage(stage_name) == 'lm' or stage_name.startswith('sft'):
    return  # pieces of any length; no text
  _table(
    config,
    stage_name,
    corpus,
    corpus.documents('heldout'),
    f'held-out documents (stage {stage_name})',
  )
  _train_tables(config, stage_name, corpus)


def heldout_batch(
  config: Config,
  stage_name: str,
  corpus: corpus_lib.Corpus,
  num_rows: int,
  batch_seed: int = 0,
  factor: int = 0,
) -> Batch:
  """Returns one fixed batch of a stage, from as many documents as possible.

  Args:
    factor: chunks of context; 0 takes the stage's largest.

  Returns:
    The stage's batch format with `num_rows` rows, or fewer if the held-out
    documents hold no more.
  """
  if stage_name.startswith('sft'):
    source = _questions(config, 'heldout')
    known = 'gold_distractors' in source.kinds
    return source.examples('gold_distractors' if known else 'given', num_rows)
  stage = config.stage[stage_name]
  tokenizer = tokenizers.load(config.data.tokenizer)
  docs = corpus.documents('heldout')
  if base_stage(stage_name) == 'lm':
    length = stage.output_length
    # Whole pieces of one document each: errors are computed over documents.
    table = windows.windows(corpus, docs, 0, length - 1, 'held-out documents')
    n_B = windows.spread(table, num_rows, batch_seed)
    doc_B, start_B = windows.locate(table, n_B)
    tokens_BT = np.full((len(n_B), length), tokenizer.bos_id, np.int32)
    first_B = corpus.token_offsets[doc_B] + start_B
    tokens_BT[:, 1:] = corpus.tokens[first_B[:, None] + np.arange(length - 1)]
    return {
      'tokens_BT': tokens_BT,
      'segment_ids_BT': np.ones_like(tokens_BT),
      'positions_BT': _positions(tokens_BT),
      'doc_B': doc_B.astype(np.int32),
    }
  table = _table(config, stage_name, corpus, docs, 'held-out documents')
  n_B = windows.spread(table, num_rows, batch_seed)
  if not factor:
    factor = context_chunks(stage, config.model.chunk_size)[-1]
  batch = _window_batch(config, stage_name, corpus, table, n_B, factor)
  if stage_name == 'mlm':
    return _masked(config, batch, n_B, batch_seed)
  return batch


def eval_windows(
  config: Config,
  corpus: corpus_lib.Corpus,
  context_length: int,
  output_length: int,
  num_windows: int,
  split: str = 'heldout',
  seed: int = 0,
) -> Batch:
  """Returns windows of all held-out documents in turn, in the batch format.

  Fewer than `num_windows` if the documents hold no more.
  """
  docs = corpus.documents(split)
  table = windows.windows(
    corpus, docs, context_length, output_length, f'{split} documents'
  )
  n_B = windows.spread(table, num_windows, seed)
  return _cut(
    config,
    corpus,
    table,
    n_B,
    num_chunks=context_length // config.model.chunk_size,
    skip=0,
    output_at=context_length,
    output_length=output_length,
    pieces=_in_pieces(config, context_length),
  )


def _in_pieces(config: Config, context_length: int) -> bool:
  """Whether CEPE can read the context: some evals have several lengths."""
  piece = config.model.piece_length
  return piece > 0 and context_length % piece == 0


def reconstruction_windows(
  config: Config,
  corpus: corpus_lib.Corpus,
  length: int,
  num_windows: int,
  split: str = 'heldout',
  seed: int = 0,
) -> Batch:
  """Returns windows whose output is their own context, in the batch format."""
  docs = corpus.documents(split)
  table = windows.windows(corpus, docs, 0, length, f'{split} documents')
  n_B = windows.spread(table, num_windows, seed)
  chunks = length // config.model.chunk_size
  return _cut(config, corpus, table, n_B, chunks, 0, 0, length)


def reconstructions_at(
  config: Config,
  corpus: corpus_lib.Corpus,
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
  return _cut(config, corpus, table, n_B, chunks, 0, 0, length)


class _Steps:
  """A random-access source for grain: item `step` is that step's batch."""

  def __init__(self, sample: Sampler, rows: np.ndarray, num_steps: int):
    self._sample, self._rows, self._num_steps = sample, rows, num_steps

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> tuple[int, Batch]:
    return step, self._sample(step, self._rows)


def _positions(tokens_BT: np.ndarray) -> np.ndarray:
  width = tokens_BT.shape[1]
  return np.broadcast_to(np.arange(width, dtype=np.int32), tokens_BT.shape)


def _lm_sampler(config, stage_name, corpus) -> Sampler:
  stage = config.stage[stage_name]
  tokenizer = tokenizers.load(config.data.tokenizer)
  seed = stream_seed(config, stage_name)
  tables = [
    windows.pack(corpus, corpus.documents('train', i), stage.output_length)
    for i in range(len(corpus.sources))
  ]
  pattern = windows.mixture(corpus.weights)
  share = stage.periodic_fraction
  num_periodic = int(windows.periodic_before(np.array(stage.batch_size), share))
  num_text = stage.batch_size - num_periodic

  def sample(step: int, row_B: np.ndarray) -> Batch:
    repeat_B = windows.is_periodic(row_B, share)
    before_B = windows.periodic_before(row_B, share)
    # Periodic rows take no text's turn: every piece is seen once an epoch.
    n_B = np.where(
      repeat_B,
      step * num_periodic + before_B,
      step * num_text + row_B - before_B,
    )
    source_B, sample_B = windows.draw(
      pattern, [t.num for t in tables], n_B, seed
    )
    out = {}
    for source, table in enumerate(tables):
      for repeat in (False, True):
        mine = (source_B == source) & (repeat_B == repeat)
        if not mine.any():
          continue
        if repeat:
          part = windows.periodic_rows(
            corpus, table, n_B[mine], tokenizer.bos_id, seed
          )
        else:
          part = windows.fill_rows(
            corpus, table, sample_B[mine], tokenizer.bos_id, tokenizer.pad_id
          )
        for name, values in part.items():
          if name not in out:
            shape = (len(row_B), *values.shape[1:])
            out[name] = np.empty(shape, values.dtype)
          out[name][mine] = values
    return out

  return sample


def _table(config, stage_name, corpus, docs, what) -> windows.Windows:
  stage = config.stage[stage_name]
  if base_stage(stage_name) in ('reconstruct', 'mlm'):  # context is target
    return windows.windows(corpus, docs, 0, stage.context_length, what)
  return windows.windows(
    corpus, docs, stage.context_length, stage.output_length, what
  )


def _train_tables(config, stage_name, corpus) -> list[windows.Windows]:
  return [
    _table(
      config,
      stage_name,
      corpus,
      corpus.documents('train', i),
      f'training documents of {name}',
    )
    for i, name in enumerate(corpus.sources)
  ]


def _window_sampler(config, stage_name, corpus) -> Sampler:
  stage = config.stage[stage_name]
  seed = stream_seed(config, stage_name)
  tables = _train_tables(config, stage_name, corpus)
  pattern = windows.mixture(corpus.weights)
  schedule = factor_schedule(config, stage_name)
  first_id = np.cumsum([0] + [t.num for t in tables])

  def sample(step: int, row_B: np.ndarray) -> Batch:
    n_B = step * stage.batch_size + row_B
    source_B, sample_B = windows.draw(
      pattern, [t.num for t in tables], n_B, seed
    )
    out = {}
    for source, table in enumerate(tables):
      mine = source_B == source
      if not mine.any():
        continue
      part = _window_batch(
        config, stage_name, corpus, table, sample_B[mine], int(schedule[step])
      )
      part['id_B'] += np.int32(first_id[source])
      for name, values in part.items():
        if name not in out:
          shape = (len(row_B), *values.shape[1:])
          out[name] = np.empty(shape, values.dtype)
        out[name][mine] = values
    return out

  return sample


def _masked_sampler(config, stage_name, sample_text: Sampler) -> Sampler:
  """Hides tokens anew at every slot of the stream, so in every epoch."""
  batch_size = config.stage[stage_name].batch_size
  seed = stream_seed(config, stage_name)

  def sample(step: int, row_B: np.ndarray) -> Batch:
    key_B = step * batch_size + row_B
    return _masked(config, sample_text(step, row_B), key_B, seed)

  return sample


def _masked(config, batch: Batch, key_B: np.ndarray, seed: int) -> Batch:
  tokenizer = tokenizers.load(config.data.encoder_tokenizer)
  return masked.mask(batch, key_B, seed, tokenizer)


def _window_batch(config, stage_name, corpus, table, n_B, factor) -> Batch:
  """Cuts windows as a stage wants them with `factor` chunks of context."""
  stage = config.stage[stage_name]
  context = factor * config.model.chunk_size
  if stage_name == 'mlm':  # nothing for the decoder
    doc_B, start_B = windows.locate(table, n_B)
    return masked.windows_twice(config, corpus, doc_B, start_B, factor) | {
      'doc_B': doc_B.astype(np.int32),
      'id_B': n_B.astype(np.int32),
    }
  if base_stage(stage_name) == 'reconstruct':  # the first chunks, themselves
    return _cut(
      config, corpus, table, n_B, factor, skip=0, output_at=0,
      output_length=context, pieces=stage_name in CEPE,
    )  # fmt: skip
  return _cut(  # the last chunks before the output
    config,
    corpus,
    table,
    n_B,
    factor,
    skip=stage.context_length - context,
    output_at=stage.context_length,
    output_length=stage.output_length,
    pieces=stage_name in CEPE,
  )


def _cut(
  config, corpus, table, n_B, num_chunks, skip, output_at, output_length,
  pieces=False,
) -> Batch:  # fmt: skip
  """Returns windows n as refrag batch; places are tokens from their begin."""
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
  rows = len(n_B)
  first_B = corpus.token_offsets[doc_B] + start_B + output_at
  token_BO = first_B[:, None] + np.arange(output_length)
  batch |= {
    'prefix_BQ': np.full((rows, 1), tokenizer.bos_id, np.int32),
    'prefix_len_B': np.ones(rows, np.int32),
    'output_BO': corpus.tokens[token_BO].astype(np.int32),
    'output_len_B': np.full(rows, output_length, np.int32),
    'loss_mask_BO': np.ones((rows, output_length), bool),
    'doc_B': doc_B.astype(np.int32),
    'id_B': n_B.astype(np.int32),
  }
  return batch


def _questions(config, split):
  from refrag_jax.data.questions import examples as rag

  return rag.build(
    config,
    tokenizers.load(config.data.tokenizer),
    tokenizers.load(config.data.encoder_tokenizer),
    split,
  )
