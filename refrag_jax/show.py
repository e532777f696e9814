"""`--mode=data`: corpus, curriculum, and examples as the model sees them.

Without colours, too, it can be read: `LEGEND` says how.

Dimension key: B rows, C chunks, K tokens of a chunk, M encoder tokens of a
chunk, O output tokens, T row length.
"""

import os
from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refrag_jax.config import schema as config_lib
from refrag_jax.config.schema import Config
from refrag_jax.data import curriculum, packing, pipeline, tokenizers
from refrag_jax.data.tasks import questions
from refrag_jax.data.text.corpus import Corpus
from refrag_jax.runtime import files
from refrag_jax.stages import STAGES

ROWS = 2  # examples of each stage
PIPE_WIDTH = 120  # columns of tables where there is no terminal
LEGEND = """how examples are written (a terminal colours them as well):
  |chunks |of toke|ns|   the decoder's tokens, chunk by chunk
  |+expand|              a chunk that stays tokens
  given [target]         output: what is given, and what is learned
  \N{PILCROW SIGN}                      a new line in the text"""
CHUNK_STYLES = ('cyan', 'green')
EXPANDED_STYLE = 'black on yellow'
TARGET_STYLE = 'bold magenta'


def run(config: Config, workdir: str) -> None:
  """Prepares the corpus and prints it; the plot goes into the workdir."""
  os.makedirs(workdir, exist_ok=True)
  console = Console(highlight=False, markup=False)
  if not console.is_terminal:
    console.width = PIPE_WIDTH
  corpus = pipeline.prepare_corpus(config, os.path.join(workdir, 'data'))
  _corpus(console, config, corpus)
  # A control arm (it names contexts) is fed what its stage is.
  stages = [name for name in config.stages if not config.stage[name].contexts]
  for name in stages:
    if len(config.stage[name].factors) > 1:
      _curriculum(console, config, name, workdir)
  console.rule('examples')
  console.print(LEGEND, soft_wrap=True)
  for name in stages:
    _stage(console, config, name, corpus)


def _corpus(console: Console, config: Config, corpus: Corpus) -> None:
  console.rule('corpus')
  console.print(corpus.summary(), soft_wrap=True)
  console.print(f'  in {corpus.directory}', soft_wrap=True)
  length_D = np.diff(corpus.token_offsets)
  for name in config.stages:
    need = STAGES[name].task.window_length(config, name)
    if need and not config.stage[name].contexts:
      short = int((length_D < need).sum())
      console.print(
        f'  {name}: windows of {need} tokens; {short:,} of {len(length_D):,} '
        'documents are shorter and left out',
        soft_wrap=True,
      )


def _curriculum(
  console: Console, config: Config, name: str, workdir: str
) -> None:
  steps = config.stage[name].num_train_steps
  k = config.model.chunk_size
  arguments = steps, config_lib.context_chunks(config.stage[name], k), k
  console.rule(f'curriculum of {name}')
  console.print(curriculum.table(*arguments))
  path = os.path.join(workdir, f'curriculum_{name}.svg')
  files.write_text(path, curriculum.plot(*arguments))
  console.print(f'drawn in {path}', soft_wrap=True)


def _stage(console: Console, config: Config, name: str, corpus: Corpus) -> None:
  stage, batch_size = STAGES[name], config.stage[name].batch_size
  task = stage.task
  console.rule(name)
  asks = task.reads == 'questions'
  if asks:
    _questions(console, config)
  # The longest contexts show most.
  step = int(np.argmax(stage.chunks_of_steps(config)))
  packed = 'tokens_BT' in task.row_shapes(config, name, 1)
  rows = np.arange(batch_size if packed else min(batch_size, ROWS))
  batch = stage.sampler(config, corpus)(step, rows)
  _arrays(console, batch, batch_size, step)
  if packed:
    _packed(console, config, batch, config.stage[name].periodic_fraction)
    return
  if 'whole_BM' in batch:
    _masked(console, config, batch)
    return
  tokenizer = tokenizers.load(config.data.tokenizer)
  expand_BC = _expand(config, name, batch['chunk_len_BC'])
  passage = config.data.passage_chunks if asks else 0
  for b in rows:
    row = {key: values[b] for key, values in batch.items()}
    console.print(f'\nexample {row["id_B"]} of document {row["doc_B"]}')
    text = example(row, expand_BC[b], tokenizer, passage)
    console.print(text, soft_wrap=True)
    console.print(_masks(row), style='dim', soft_wrap=True)
  # The same for every stage, but that passages end in short chunks.
  if task.regenerates or asks:
    row = {key: values[0] for key, values in batch.items()}
    encoder_tokenizer = tokenizers.load(config.data.encoder_tokenizer)
    first = 0
    if passage:  # the end of the first passage
      first = max(0, np.count_nonzero(row['chunk_len_BC'][:passage]) - 3)
    console.print(chunk_table(row, first, encoder_tokenizer))


def _questions(console: Console, config: Config) -> None:
  for split in ('train', 'heldout'):
    source = questions.build(config, split)
    kinds = Counter(question.kind for question in source.questions)
    asked = ', '.join(f'{n:,} {kind}' for kind, n in kinds.items() if kind)
    console.print(
      f'{split}: {len(source.questions):,} questions{asked and f" ({asked})"}, '
      f'{len(source.passages):,} passages'
    )
    for line in source.skipped:
      console.print(f'  {line}')


def _arrays(console: Console, batch, batch_size: int, step: int) -> None:
  shapes = ', '.join(
    f'{key} {"x".join(map(str, (batch_size, *values.shape[1:])))}'
    for key, values in batch.items()
  )
  console.print(f'batch of step {step}: {shapes}', style='dim')


def _packed(console: Console, config: Config, batch, share: float) -> None:
  """One packed row and, where there are any, one that repeats a span."""
  tokenizer = tokenizers.load(config.data.tokenizer)
  rows = np.arange(len(batch['tokens_BT']))
  segments_B = batch['segment_ids_BT'].max(axis=1)
  repeats_B = packing.is_periodic(rows, share)
  console.print(
    f'every token but BOS is a target; {share:.0%} of the rows repeat a span'
  )
  chosen = [('packed', int(np.argmax(segments_B)))]
  if repeats_B.any():
    chosen.append(('repeating', int(np.argmax(repeats_B))))
  for what, b in chosen:
    text = Text(f'\nrow {b}, {what}\n')
    segments_T, tokens_T = batch['segment_ids_BT'][b], batch['tokens_BT'][b]
    for number in range(1, segments_B[b] + 1):
      ids = tokens_T[segments_T == number]
      text.append('BOS ', 'dim').append('[')
      text.append(
        _decode(tokenizer, ids[1:]), CHUNK_STYLES[number % len(CHUNK_STYLES)]
      ).append('] ')
    text.append(f'{int((segments_T == 0).sum())} x padding', 'dim')
    console.print(text, soft_wrap=True)


def _masked(console: Console, config: Config, batch) -> None:
  """Windows whole and in chunks, what is to be predicted in brackets."""
  tokenizer = tokenizers.load(config.data.encoder_tokenizer)
  console.print('[what stood there|what the encoder reads]')
  for b in range(len(batch['doc_B'])):
    text = Text(f'\nexample {batch["id_B"][b]} of document {batch["doc_B"][b]}')
    whole = batch['whole_BM'][b], batch['whole_target_BM'][b]
    text.append('\nwhole   ').append(_hidden(tokenizer, *whole))
    text.append('\nchunks  |')
    for ids_M, target_M in zip(
      batch['encoder_BCM'][b], batch['encoder_target_BCM'][b]
    ):
      text.append(_hidden(tokenizer, ids_M, target_M)).append('|')
    console.print(text, soft_wrap=True)


def _hidden(tokenizer, ids_M: np.ndarray, target_M: np.ndarray) -> Text:
  """An encoder input with what is to be predicted in brackets."""
  text, special = Text(), {
    tokenizer.cls_id: '', tokenizer.sep_id: '', tokenizer.pad_id: '',
    tokenizer.mask_id: 'MASK',
  }  # fmt: skip
  for read, stood in zip(ids_M.tolist(), target_M.tolist()):
    shown = special.get(read, _decode(tokenizer, [read]))
    if stood >= 0:
      shown = f'[{_decode(tokenizer, [stood])}|{shown}]'
    text.append(shown, TARGET_STYLE if stood >= 0 else '')
  return text


def _expand(config: Config, name: str, chunk_len_BC: np.ndarray) -> np.ndarray:
  """A choice of chunks such as the stage makes on the device; else none."""
  expand_BC = np.zeros(chunk_len_BC.shape, bool)
  fractions = config.stage[name].expand_fractions
  if fractions:
    number = config_lib.expanded_chunks(fractions[-1], chunk_len_BC.shape[1])
    rng = np.random.default_rng(config.seed)
    for expand_C in expand_BC:
      expand_C[rng.permutation(len(expand_C))[:number]] = True
  return expand_BC


def example(row, expand_C: np.ndarray, tokenizer, passage: int = 0) -> Text:
  """One row of a refrag batch, written as `LEGEND` says.

  Args:
    row: the batch's arrays, each without its first dimension.
    expand_C: the chunks that stay tokens.
    tokenizer: the decoder's.
    passage: chunks that each passage has room for, to begin a line with each;
      0 where the context is one window.

  Returns:
    The text, styled.
  """
  text = Text()
  prefix = _decode(tokenizer, row['prefix_BQ'][1 : row['prefix_len_B']])
  text.append('BOS ', 'dim').append(prefix)
  text.append('' if passage else '|')
  present = np.flatnonzero(row['chunk_len_BC'])
  for turn, c in enumerate(present):
    ids = row['chunks_BCK'][c, : row['chunk_len_BC'][c]]
    style = CHUNK_STYLES[turn % len(CHUNK_STYLES)]
    if passage and c % passage == 0:
      text.append('\n  |')
    if expand_C[c]:
      text.append('+', EXPANDED_STYLE)
      style = EXPANDED_STYLE
    text.append(_decode(tokenizer, ids), style)
    text.append('|')
  length = row['output_len_B']
  learned_O = row['loss_mask_BO'][:length]
  given = int(np.argmax(learned_O)) if learned_O.any() else length
  text.append('\n  ' if passage else ' ')
  ids = row['output_BO'][:length]
  text.append(_decode(tokenizer, ids[:given]))
  text.append('[')
  text.append(_decode(tokenizer, ids[given:]), TARGET_STYLE)
  if length and ids[-1] == tokenizer.eos_id:
    text.append(' EOS', TARGET_STYLE)
  text.append(']')
  return text


def _masks(row) -> str:
  """The row's lengths and its loss mask, in words."""
  length, slots = int(row['output_len_B']), len(row['output_BO'])
  learned = int(row['loss_mask_BO'].sum())
  chunk_len_C = row['chunk_len_BC']
  return (
    f'prefix {row["prefix_len_B"]} of {len(row["prefix_BQ"])}; chunks '
    f'{np.count_nonzero(chunk_len_C)} of {len(chunk_len_C)} present, '
    f'{int(chunk_len_C.sum())} tokens; output: {length - learned} given, '
    f'{learned} with loss, {slots - length} padding'
  )


def chunk_table(row, first: int, encoder_tokenizer) -> Table:
  """Three of a row's chunks: the decoder's ids beside the encoder's."""
  table = Table(title='chunks of the first example', show_lines=True)
  for heading in ('chunk', 'decoder ids', 'encoder ids', 'encoder reads'):
    table.add_column(heading, overflow='fold')
  names = {
    encoder_tokenizer.cls_id: 'CLS',
    encoder_tokenizer.sep_id: 'SEP',
  }
  for c in range(first, min(first + 3, len(row['chunk_len_BC']))):
    if not row['chunk_len_BC'][c]:
      continue
    ids = row['encoder_BCM'][c, : row['encoder_len_BC'][c]].tolist()
    shown = [names[ids[0]], *map(str, ids[1:-1]), names[ids[-1]]]
    table.add_row(
      str(c),
      _ids(row['chunks_BCK'][c], row['chunk_len_BC'][c]),
      ' '.join(shown),
      Text(_decode(encoder_tokenizer, ids[1:-1])),
    )
  return table


def _ids(chunk_K: np.ndarray, length: int) -> str:
  padding = ['PAD'] * (len(chunk_K) - length)
  return ' '.join([*map(str, chunk_K[:length]), *padding])


def _decode(tokenizer, ids) -> str:
  text = tokenizer.decode(ids).replace('\n', '\N{PILCROW SIGN}')
  # A corpus may hold escape sequences that a terminal would obey.
  return ''.join(c if c.isprintable() else '\N{MIDDLE DOT}' for c in text)
