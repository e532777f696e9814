"""The batch: what its fields hold, and how contexts and outputs are cut.

A batch is a dict of arrays, NumPy on the host and JAX inside a step. The
letters that end a field's name are its axes, in order:

  B rows, T row length, Q prefix, C chunks (the paper's L), K tokens of a chunk
  (k), M encoder tokens of a chunk, a piece or a whole window, P pieces,
  O output tokens

Rows shorter than an axis are filled up behind; the `_len_` field beside says
where they end. Nothing here knows a stage: which fields there are says what
reads them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

Batch = dict[str, Any]


class Field(NamedTuple):
  dtype: type
  meaning: str


INTEGER, TRUTH = np.int32, np.bool_
FIELDS = {
  # The decoder's sequence: prefix, context, output.
  'prefix_BQ': Field(INTEGER, 'decoder ids before the context: BOS, question'),
  'prefix_len_B': Field(INTEGER, 'ids of the prefix, at least 1'),
  'chunks_BCK': Field(INTEGER, 'decoder ids of the context, chunk by chunk'),
  'chunk_len_BC': Field(INTEGER, 'ids of a chunk; 0: there is no such chunk'),
  'output_BO': Field(INTEGER, 'decoder ids to predict, or given before them'),
  'output_len_B': Field(INTEGER, 'ids of the output'),
  'loss_mask_BO': Field(TRUTH, 'which outputs are predicted'),
  # The same context as the encoder reads it.
  'encoder_BCM': Field(INTEGER, 'encoder ids of a chunk: CLS, text, SEP'),
  'encoder_len_BC': Field(INTEGER, 'encoder ids of a chunk, CLS and SEP too'),
  'encoder_cut_B': Field(INTEGER, 'chunks with more encoder ids than M'),
  'piece_BPM': Field(INTEGER, "CEPE's encoder ids of a piece of the context"),
  'piece_len_BP': Field(INTEGER, 'encoder ids of a piece; 0: no such piece'),
  # Packed rows of plain text (`lm`).
  'tokens_BT': Field(INTEGER, 'decoder ids; every segment begins with BOS'),
  'segment_ids_BT': Field(INTEGER, 'which segment, from 1; 0: padding'),
  'positions_BT': Field(INTEGER, 'position in the segment, from 0'),
  # Masked text (`mlm`).
  'whole_BM': Field(INTEGER, 'encoder ids of a window, some hidden'),
  'whole_len_B': Field(INTEGER, 'encoder ids of a window'),
  'whole_target_BM': Field(INTEGER, 'the hidden ids; -1: nothing to predict'),
  'encoder_target_BCM': Field(INTEGER, 'the hidden ids of the chunks; or -1'),
  # Where a row comes from.
  'doc_B': Field(INTEGER, 'document (question): the unit of standard errors'),
  'id_B': Field(INTEGER, 'window (question) among all of the source'),
}
CONTEXT_AXES = ('C', 'P')
PIECES = ('piece_BPM', 'piece_len_BP')


def axes(field: str) -> str:
  """The letters of a field's axes, in order."""
  return field.rpartition('_')[2]


def shapes(
  fields: Iterable[str], **sizes: int
) -> dict[str, tuple[tuple[int, ...], type]]:
  """field: (shape of one row, dtype), for sizes of all axes but B."""
  return {
    field: (
      tuple(sizes[axis] for axis in axes(field).removeprefix('B')),
      FIELDS[field].dtype,
    )
    for field in fields
  }


def take(batch: Batch, rows: Any) -> Batch:
  """Some rows of a batch; `rows` is an index, a slice or a mask."""
  return {field: values[rows] for field, values in batch.items()}


def join(num_rows: int, parts: Iterable[tuple[np.ndarray, Batch]]) -> Batch:
  """One batch of parts, each with the mask of the rows that it fills."""
  out: Batch = {}
  for rows_B, part in parts:
    for field, values in part.items():
      if field not in out:
        out[field] = np.empty((num_rows, *values.shape[1:]), values.dtype)
      out[field][rows_B] = values
  return out


def context(batch: Batch) -> Batch:
  """The fields of a batch's contexts, in chunks and in pieces."""
  return {
    field: values
    for field, values in batch.items()
    if field in FIELDS and axes(field)[1:2] in CONTEXT_AXES
  }


def with_contexts_of(batch: Batch, row_B: np.ndarray) -> Batch:
  """The batch, each row with the context of another row."""
  return batch | take(context(batch), row_B)


def side_by_side(batch: Batch, row_BX: np.ndarray) -> Batch:
  """The batch, each row with the chunks of X rows' contexts in a line.

  Without pieces: those are of a row's own context.
  """
  batch = without_pieces(batch)
  joined = {}
  for field, values in context(batch).items():
    picked = values[row_BX]  # (B, X, C, ...)
    joined[field] = picked.reshape(len(picked), -1, *picked.shape[3:])
  return batch | joined


def cut_chunks(batch: Batch, chunks: slice) -> Batch:
  """The batch with some chunks of its contexts, and without pieces."""
  batch = without_pieces(batch)
  return batch | {
    field: values[:, chunks] for field, values in context(batch).items()
  }


def fitted(batch: Batch, outputs: int) -> Batch:
  """The batch without the prefix's slots and the last chunks that no row fills.

  On the host; with the first `outputs` output slots, without pieces. Chunks
  keep their places, so that a row's passages still begin where they did; one
  slot is left, as the encoder wants it.
  """
  there_C = (batch['chunk_len_BC'] > 0).any(0)
  chunks = slice(int(there_C.nonzero()[0].max(initial=0)) + 1)
  prefix_BQ = batch['prefix_BQ'][:, : int(batch['prefix_len_B'].max())]
  return (
    cut_chunks(batch, chunks)
    | {'prefix_BQ': prefix_BQ}
    | _first_outputs(batch, outputs)
  )


def _first_outputs(batch: Batch, number: int) -> Batch:
  return {
    field: values[:, :number]
    for field, values in batch.items()
    if axes(field) == 'BO'
  }


def without_pieces(batch: Batch) -> Batch:
  return {field: batch[field] for field in batch if field not in PIECES}


def last_tokens(batch: Batch) -> Batch:
  """The batch with the last context tokens alone, as many as it has chunks.

  On the host. Chunks may be ragged or absent; there are no encoder's fields.
  """
  len_BC = batch['chunk_len_BC']
  B, C, K = batch['chunks_BCK'].shape
  chunks_B1C = np.zeros((B, 1, C), INTEGER)
  kept_B1 = np.zeros((B, 1), INTEGER)
  there_BCK = np.arange(K) < len_BC[:, :, None]
  for row, there_CK in enumerate(there_BCK):
    ids = batch['chunks_BCK'][row][there_CK]
    ids = ids[max(0, len(ids) - np.count_nonzero(len_BC[row])) :]
    chunks_B1C[row, 0, : len(ids)] = ids
    kept_B1[row] = len(ids)
  own = context(batch).keys()
  plain = {field: batch[field] for field in batch if field not in own}
  return plain | {'chunks_BCK': chunks_B1C, 'chunk_len_BC': kept_B1}


def cut_outputs(batch: Batch, number: int) -> Batch:
  """The batch with the first outputs alone, all of which are there."""
  full_B = batch['output_len_B'] * 0 + number
  return batch | _first_outputs(batch, number) | {'output_len_B': full_B}


def plain(
  prefix_BQ: np.ndarray, output_BO: np.ndarray, doc_B: np.ndarray
) -> Batch:
  """A batch without context: a whole prefix, a whole output."""
  (rows, Q), O = prefix_BQ.shape, output_BO.shape[1]
  return {
    'prefix_BQ': prefix_BQ.astype(INTEGER),
    'prefix_len_B': np.full(rows, Q, INTEGER),
    'output_BO': output_BO.astype(INTEGER),
    'output_len_B': np.full(rows, O, INTEGER),
    'loss_mask_BO': np.ones((rows, O), TRUTH),
    'doc_B': doc_B.astype(INTEGER),
  }


def no_chunks(rows: int, chunk_size: int) -> Batch:
  """The fields of a context of no chunk at all."""
  return {
    'chunks_BCK': np.zeros((rows, 0, chunk_size), INTEGER),
    'chunk_len_BC': np.zeros((rows, 0), INTEGER),
  }
