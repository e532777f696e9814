"""Masked text for the encoder's own pre-training (stage `mlm`).

As BERT (Devlin et al. 2019) and RoBERTa, the paper's encoder: of the tokens,
special ones aside, 15 % are to be predicted; 80 % of these are hidden behind
MASK, 10 % replaced by a random id, 10 % left as they are. Which, is a hash of
(seed, row's number, place): another choice in every epoch, as RoBERTa's, and
the same in any process.

Dimension key: B windows, C chunks, M encoder tokens of a chunk or window.
"""

import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.data import chunking, tokenizers
from refrag_jax.data.text.corpus import Corpus
from refrag_jax.data.tokenizers import Tokenizer
from refrag_jax.data.windows import mix

PREDICTED = 0.15
HIDDEN, REPLACED = 0.8, 0.1  # of those; the others are left as they are
NOT_PREDICTED = -1


def windows_twice(
  config: Config,
  corpus: Corpus,
  doc_B: np.ndarray,
  start_B: np.ndarray,
  num_chunks: int,
) -> dict[str, np.ndarray]:
  """Windows as the encoder reads them: whole, as RoBERTa text, and in chunks.

  What a window has beyond the encoder's positions is cut from the whole one;
  the chunks hold it.

  Returns:
    whole_BM and encoder_BCM (CLS first, SEP last, padding behind) with their
    lengths whole_len_B and encoder_len_BC.
  """
  k, room = config.model.chunk_size, config.data.max_encoder_tokens
  encode = lambda number, size, max_tokens: chunking.chunk_windows(
    corpus,
    doc_B,
    start_B,
    number,
    size,
    tokenizers.load(config.data.encoder_tokenizer),
    max_tokens,
  )[0]
  whole = encode(
    1,
    num_chunks * k,
    min(room * num_chunks, config.model.encoder.max_length),
  )
  chunks = encode(num_chunks, k, room)
  return {
    'whole_BM': whole['encoder_BCM'][:, 0],
    'whole_len_B': whole['encoder_len_BC'][:, 0],
    'encoder_BCM': chunks['encoder_BCM'],
    'encoder_len_BC': chunks['encoder_len_BC'],
  }


def mask(
  batch: dict[str, np.ndarray], key_B: np.ndarray, seed: int, tokenizer
) -> dict[str, np.ndarray]:
  """Hides tokens of a batch of `windows_twice` and adds what they were.

  Args:
    key_B: a number per row; equal numbers give equal masks.
    tokenizer: the encoder's.

  Returns:
    The batch with whole_target_BM and encoder_target_BCM: the ids to predict,
    NOT_PREDICTED elsewhere.
  """
  out = dict(batch)
  for salt, (ids, length, target) in enumerate((
    ('whole_BM', 'whole_len_B', 'whole_target_BM'),
    ('encoder_BCM', 'encoder_len_BC', 'encoder_target_BCM'),
  )):  # fmt: skip
    out[ids], out[target] = hide(
      batch[ids], batch[length], key_B, (seed, salt), tokenizer
    )
  return out


def hide(
  ids: np.ndarray,
  length: np.ndarray,
  key_B: np.ndarray,
  salt: tuple[int, ...],
  tokenizer: Tokenizer,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids with some hidden, and the targets; both int32 (B, ..., M).

  Args:
    ids: (B, ..., M), CLS first, SEP last, padding behind.
    length: (B, ...), real tokens, special ones included.
    key_B: as in `mask`.
    salt: tells draws for one and the same row apart.
  """
  place = np.arange(ids[0].size).reshape(ids.shape[1:])[None]
  key = key_B.reshape(-1, *[1] * (ids.ndim - 1))

  def uniform(number):  # in [0, 1), one a token
    return mix(*salt, number, key, place) / np.float64(2**64)

  m = np.arange(ids.shape[-1])
  inside = (m > 0) & (m < length[..., None] - 1)
  predicted = inside & (uniform(0) < PREDICTED)
  what = uniform(1)
  random_ids = (uniform(2) * tokenizer.vocab_size).astype(np.int32)
  new = np.where(what < HIDDEN, tokenizer.mask_id, random_ids)
  new = np.where(what < HIDDEN + REPLACED, new, ids)
  return (
    np.where(predicted, new, ids).astype(np.int32),
    np.where(predicted, ids, NOT_PREDICTED).astype(np.int32),
  )
