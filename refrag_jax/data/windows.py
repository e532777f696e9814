"""Which tokens a sample is made of: windows, packed rows, repeated spans.

Everything here is arithmetic on the lengths of documents, or a hash of
(seed, number): sample n of a stream is found without having seen sample n - 1,
so that the batch of a step is a pure function of the step.

Dimension key: B samples, T row length, R rows, P pieces.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from refrag_jax.data.text.corpus import Corpus
from refrag_jax.errors import UserError

PERIODS = (6, 32)  # shortest and longest span that `periodic_rows` repeats
MIXTURE_PERIOD = 1024  # mixture weights are honoured to one part in so many


# --- Windows ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Windows:
  """The windows of s context and o output tokens in a set of documents.

  Window w of a document has the context [w*o, w*o + s) and the output
  [w*o + s, w*o + s + o): neighbours share context, never a target token.
  """

  context: int  # s
  output: int  # o
  docs: np.ndarray  # int64[D], documents with at least one window
  bounds: np.ndarray  # int64[D + 1], windows before each of them
  short: int  # documents left out because they hold no window

  @property
  def num(self) -> int:
    return int(self.bounds[-1])


def windows(
  corpus: Corpus, docs: np.ndarray, context: int, output: int, what: str = ''
) -> Windows:
  """Builds the table of windows; documents too short are left out, counted.

  Args:
    what: names the documents in the message when all of them are too short.
  """
  length = np.diff(corpus.token_offsets)[docs]
  number = np.maximum(0, (length - context) // output)
  if not number.any():
    longest = int(length.max()) if len(docs) else 0
    raise UserError(
      f'none of the {len(docs)} {what or "documents"} holds a window of '
      f'{context} + {output} = {context + output} tokens (the longest has '
      f'{longest}): lower context_length or output_length, or bring longer '
      'documents'
    )
  long = number > 0
  bounds = np.concatenate([[0], np.cumsum(number[long])]).astype(np.int64)
  return Windows(
    context, output, docs[long], bounds, int(len(docs) - long.sum())
  )


def locate(table: Windows, n_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns document and first token (in the document) of windows n."""
  row_B = np.searchsorted(table.bounds, n_B, side='right') - 1
  return table.docs[row_B], (n_B - table.bounds[row_B]) * table.output


def spread(table: Windows, num: int, seed: int) -> np.ndarray:
  """Picks windows from as many documents as possible, without repetition.

  Round-robin over the documents in a random order, each document's windows in
  a random order of their own. Returns fewer than `num` if there are not more.
  """
  rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
  docs = rng.permutation(len(table.docs))[:num]
  count = np.diff(table.bounds)[docs]
  rounds = 1
  while np.minimum(count, rounds).sum() < min(num, count.sum()):
    rounds *= 2
  picked = [
    np.stack(
      [
        np.arange(min(n, rounds)),
        table.bounds[d] + rng.permutation(n)[:rounds],
      ]
    )
    for d, n in zip(docs, count, strict=True)
  ]
  turn, window = np.concatenate(picked, axis=1)
  return window[np.argsort(turn, kind='stable')][:num]


# --- Order -----------------------------------------------------------------


def mix(*values) -> np.ndarray:
  """Hashes integers (arrays broadcast) into uint64 (splitmix64's finaliser)."""
  with np.errstate(over='ignore'):
    h = np.uint64(0x9E3779B97F4A7C15)
    for value in values:
      h = h ^ np.asarray(value).astype(np.uint64)
      h = (h + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
      h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      h = h ^ (h >> np.uint64(31))
  return h


def permute(n_B: np.ndarray, size: int, *key) -> np.ndarray:
  """Returns where a pseudo-random permutation of range(size) takes each n.

  A Feistel network on the next power of four, walked until it lands inside:
  random access into a shuffle of any size without ever storing one. `key` may
  hold arrays of n's shape.
  """
  half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
  shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
  keys = [np.broadcast_to(np.asarray(k), n_B.shape) for k in key]
  out = n_B.astype(np.uint64)
  outside = np.ones(n_B.shape, bool)
  while outside.any():
    left, right = out[outside] >> shift, out[outside] & mask
    here = [k[outside] for k in keys]
    for turn in range(6):
      left, right = right, left ^ (mix(turn, *here, right) & mask)
    out[outside] = (left << shift) | right
    outside = out >= size
  return out.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """A repeating pattern of sources; see `mixture`."""

  sources: np.ndarray  # int64[MIXTURE_PERIOD], the source of each slot
  before: np.ndarray  # int64[MIXTURE_PERIOD], its earlier slots in the pattern
  counts: np.ndarray  # int64[sources], slots a pattern


def mixture(weights: Sequence[float]) -> Mixture:
  """Spreads sources over slots as evenly as their weights allow."""
  if len(weights) == 1:
    zero = np.zeros(1, np.int64)
    return Mixture(zero, zero, np.ones(1, np.int64))
  shares = np.asarray(weights, np.float64) / np.sum(weights)
  counts = np.maximum(1, np.rint(shares * MIXTURE_PERIOD)).astype(np.int64)
  when = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
  order = np.argsort(when, kind='stable')
  sources = np.repeat(np.arange(len(counts)), counts)[order]
  before = np.concatenate([np.arange(c) for c in counts])[order]
  return Mixture(sources, before, counts)


def draw(
  pattern: Mixture, sizes: Sequence[int], n_B: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the source, and the sample of that source, of slots n.

  Each source is gone through in epochs: every sample once, in an order of its
  own per epoch, whatever the other sources do.
  """
  period, slot = np.divmod(n_B, len(pattern.sources))
  source_B = pattern.sources[slot]
  count_B = period * pattern.counts[source_B] + pattern.before[slot]
  sample_B = np.zeros_like(n_B)
  for source, size in enumerate(sizes):
    mine = source_B == source
    epoch, i = np.divmod(count_B[mine], size)
    sample_B[mine] = permute(i, size, seed, source, epoch)
  return source_B, sample_B


# --- Rows of plain tokens (`lm`) ----------------------------------------------


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
