"""Rows of plain tokens: documents packed into rows, and repeated spans.

Everything here is arithmetic on the lengths of documents, or a hash of
(seed, number), as in windows.py.

Dimension key: B samples, T row length, R rows, P pieces.
"""

import dataclasses

import numpy as np

from refrag_jax.data.text.corpus import Corpus
from refrag_jax.data.windows import mix
from refrag_jax.errors import UserError

PERIODS = (6, 32)  # shortest and longest span that `periodic_rows` repeats


@dataclasses.dataclass(frozen=True)
class Rows:
  """Documents cut into pieces, pieces packed into rows of T tokens.

  Every piece is preceded by BOS. Row r has pieces bounds[r] to bounds[r + 1].
  """

  length: int  # T
  doc: np.ndarray  # int64[P]
  start: np.ndarray  # int64[P], first token, in the document
  size: np.ndarray  # int64[P], tokens without BOS
  bounds: np.ndarray  # int64[R + 1]
  tokens: np.ndarray  # int64[P + 1], tokens in the pieces before each

  @property
  def num(self) -> int:
    return len(self.bounds) - 1


def pack(corpus: Corpus, docs: np.ndarray, length: int) -> Rows:
  """Cuts documents into pieces of T - 1 tokens and packs the tails.

  Full pieces fill a row each. Tails go, longest first, where they leave the
  least room (best fit decreasing): deterministic, and fast because the rows
  with some room left are bits of one integer.

  Args:
    docs: numbers of the corpus's documents, int (N,).
    length: T, tokens of a row.

  Raises:
    UserError: there is no document.
  """
  body = length - 1
  total = np.diff(corpus.token_offsets)[docs]
  if not len(docs):
    raise UserError('no document to make rows of text from')
  whole = total // body
  doc = np.repeat(docs, whole)
  start = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
  tails = np.flatnonzero(total % body)
  tails = tails[np.argsort(-(total % body)[tails], kind='stable')]
  rows, room, open_rooms = [], {}, 0
  for t in tails:
    need = int(total[t] % body) + 1
    fitting = open_rooms >> need
    if fitting:
      left = need + (fitting & -fitting).bit_length() - 1
      row = room[left].pop()
      if not room[left]:
        open_rooms ^= 1 << left
    else:
      left, row = length, len(rows)
      rows.append([])
    rows[row].append(t)
    left -= need
    if left > 1:  # room for BOS and a token
      room.setdefault(left, []).append(row)
      open_rooms |= 1 << left
  packed = np.asarray([t for row in rows for t in row], np.int64)
  size = np.concatenate([np.full(len(doc), body), (total % body)[packed]])
  pieces = np.concatenate([np.ones(len(doc), int), [len(r) for r in rows]])
  return Rows(
    length,
    np.concatenate([doc, docs[packed]]),
    np.concatenate([start, whole[packed]]) * body,
    size,
    np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64),
    np.concatenate([[0], np.cumsum(size)]).astype(np.int64),
  )


def fill_rows(
  corpus: Corpus, table: Rows, r_B: np.ndarray, bos_id: int, pad_id: int
) -> dict[str, np.ndarray]:
  """Returns the tokens of packed rows with segments and positions."""
  shape = (len(r_B), table.length)
  out = {
    'tokens_BT': np.full(shape, pad_id, np.int32),
    'segment_ids_BT': np.zeros(shape, np.int32),
    'positions_BT': np.zeros(shape, np.int32),
    'doc_B': table.doc[table.bounds[r_B]].astype(np.int32),
  }
  for b, r in enumerate(r_B):
    at = 0
    for number, p in enumerate(range(*table.bounds[r : r + 2]), 1):
      end = at + 1 + int(table.size[p])
      begin = corpus.token_offsets[table.doc[p]] + table.start[p]
      out['tokens_BT'][b, at] = bos_id
      out['tokens_BT'][b, at + 1 : end] = corpus.tokens[
        begin : begin + table.size[p]
      ]
      out['segment_ids_BT'][b, at:end] = number
      out['positions_BT'][b, at:end] = np.arange(end - at)
      at = end
  return out


def is_periodic(row_B: np.ndarray, fraction: float) -> np.ndarray:
  """Returns which rows of a batch repeat a span: evenly spread, exact share."""
  return periodic_before(row_B + 1, fraction) > periodic_before(row_B, fraction)


def periodic_before(row_B: np.ndarray, fraction: float) -> np.ndarray:
  """Returns how many of a batch's rows before `row` are periodic."""
  return np.floor(row_B * fraction + 1e-9).astype(np.int64)


def periodic_rows(
  corpus: Corpus,
  table: Rows,
  key_B: np.ndarray,
  bos_id: int,
  seed: int,
) -> dict[str, np.ndarray]:
  """Returns rows of BOS and one span repeated to the end.

  Half of the spans are text as it stands; the others are single tokens from
  all over the text, which can be predicted only by looking one period back.
  A small decoder does not learn to copy from its context otherwise.

  Args:
    key_B: a number per row; equal numbers give equal rows.
  """
  low, high = PERIODS
  step = np.arange(high)

  def uniform(size, *salt):  # integers below `size`
    return (mix(seed, *salt) % np.uint64(size)).astype(np.int64)

  def locate_tokens(number):  # of the text's tokens: piece, place in it
    piece = np.searchsorted(table.tokens, number, side='right') - 1
    return piece, number - table.tokens[piece]

  def place(piece, within):  # in the corpus
    first = corpus.token_offsets[table.doc[piece]] + table.start[piece]
    return first + within

  period_B = low + uniform(high - low + 1, 1, key_B)
  shuffled_B = uniform(2, 2, key_B) == 1
  piece_B, within_B = locate_tokens(uniform(table.tokens[-1], 3, key_B))
  last_B = table.size[piece_B] - 1
  within_B = np.clip(within_B, 0, np.maximum(0, last_B + 1 - period_B))
  plain_BP = place(
    piece_B[:, None], np.minimum(within_B[:, None] + step, last_B[:, None])
  )
  any_BP = place(
    *locate_tokens(uniform(table.tokens[-1], 4, key_B[:, None], step))
  )
  span_BP = corpus.tokens[np.where(shuffled_B[:, None], any_BP, plain_BP)]
  turn_BT = np.arange(table.length - 1) % period_B[:, None]
  tokens_BT = np.full((len(key_B), table.length), bos_id, np.int32)
  tokens_BT[:, 1:] = np.take_along_axis(span_BP, turn_BT, axis=1)
  positions_T = np.arange(table.length, dtype=np.int32)
  return {
    'tokens_BT': tokens_BT,
    'segment_ids_BT': np.ones_like(tokens_BT),
    'positions_BT': np.broadcast_to(positions_T, tokens_BT.shape),
    'doc_B': table.doc[piece_B].astype(np.int32),
  }
