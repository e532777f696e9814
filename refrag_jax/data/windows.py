"""Which tokens a sample is made of: windows of documents, and their order.

Everything here is arithmetic on the lengths of documents, or a hash of
(seed, number): sample n of a stream is found without having seen sample n - 1,
so that the batch of a step is a pure function of the step.

Dimension key: B samples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from refrag_jax.data.text.corpus import Corpus
from refrag_jax.errors import UserError

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
    docs: numbers of the corpus's documents, int (N,).
    context: tokens of a window's context.
    output: tokens of its output.
    what: names the documents in the message when all of them are too short.

  Raises:
    UserError: every document is too short.
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


def passes(
  weights: Sequence[float], sizes: Sequence[float], draws: int
) -> float:
  """How often `draws` samples go through the source that they repeat most."""
  return max(
    draws * weight / sum(weights) / size
    for weight, size in zip(weights, sizes, strict=True)
  )


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
