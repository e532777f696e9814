"""Chunks: k decoder tokens, and the same stretch of text for the encoder.

A chunk's text is the union of its tokens' spans (tokenizers.py), so the chunks
partition their passage and no text is ever decoded and encoded again. Chunks
never reach over the end of a passage: the last one may be short.

Dimension key: B windows, C chunks, K tokens of a chunk, M encoder tokens of a
chunk with its CLS and SEP, N spans.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refrag_jax.data.text.corpus import Corpus
from refrag_jax.data.tokenizers import Tokenizer


class Chunks(NamedTuple):
  """One passage's chunks; absent ones (see `max_chunks`) have length 0."""

  chunks_CK: np.ndarray  # int32, decoder ids, padded
  chunk_len_C: np.ndarray  # int32
  encoder_CM: np.ndarray  # int32, encoder ids with CLS and SEP, padded
  encoder_len_C: np.ndarray  # int32
  spans_C2: np.ndarray  # int32, first and last + 1 character of each chunk
  truncated_C: np.ndarray  # bool, had more encoder tokens than fit


def chunk_passage(
  text: str,
  tokenizer: Tokenizer,
  encoder_tokenizer: Tokenizer,
  chunk_size: int,
  max_encoder_tokens: int,
  max_chunks: int = 0,
) -> Chunks:
  """Cuts one passage into ceil(tokens / k) chunks; zero tokens give none.

  Args:
    max_chunks: with 0, C is what the passage needs; else C is this, absent
      chunks fill it up, and text beyond it is left out.
  """
  ids_T, starts_T = tokenizer.encode(text)
  bounds = np.append(starts_T, len(text)).astype(np.int32)
  if max_chunks:
    ids_T = ids_T[: max_chunks * chunk_size]
  present = -(-len(ids_T) // chunk_size)
  num = max_chunks or present
  # First token of each chunk; the last present one may end early.
  first_C = np.minimum(np.arange(num + 1) * chunk_size, len(ids_T))
  chunks_CK = np.full((num, chunk_size), tokenizer.pad_id, np.int32)
  chunks_CK.reshape(-1)[: len(ids_T)] = ids_T
  spans_C2 = np.stack([bounds[first_C[:-1]], bounds[first_C[1:]]], axis=1)
  encoder_CM = np.full(
    (num, max_encoder_tokens), encoder_tokenizer.pad_id, np.int32
  )
  encoder_len_C = np.zeros(num, np.int32)
  truncated_C = np.zeros(num, bool)
  encoder_CM[:present], encoder_len_C[:present], truncated_C[:present] = (
    encode_spans(
      [text[a:b] for a, b in spans_C2[:present]],
      encoder_tokenizer,
      max_encoder_tokens,
    )
  )
  return Chunks(
    chunks_CK,
    np.diff(first_C).astype(np.int32),
    encoder_CM,
    encoder_len_C,
    spans_C2,
    truncated_C,
  )


def encode_spans(
  texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Encodes chunk texts, each between CLS and SEP.

  Returns:
    encoder_NM, encoder_len_N, and truncated_N: which were cut to max_tokens
    (their SEP is kept).
  """
  ids_NM = np.full((len(texts), max_tokens), tokenizer.pad_id, np.int32)
  len_N = np.zeros(len(texts), np.int32)
  truncated_N = np.zeros(len(texts), bool)
  for n, ids in enumerate(tokenizer.ids_batch(texts)):
    truncated_N[n] = len(ids) > max_tokens - 2
    ids = ids[: max_tokens - 2]
    len_N[n] = len(ids) + 2
    ids_NM[n, 0] = tokenizer.cls_id
    ids_NM[n, 1 : len(ids) + 1] = ids
    ids_NM[n, len(ids) + 1] = tokenizer.sep_id
  return ids_NM, len_N, truncated_N


def chunk_windows(
  corpus: Corpus,
  doc_B: np.ndarray,
  start_B: np.ndarray,
  num_chunks: int,
  chunk_size: int,
  encoder_tokenizer: Tokenizer,
  max_encoder_tokens: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns the chunks of C * k corpus tokens from each of these positions.

  Args:
    start_B: the first token of the first chunk, counted in its document; all
      C * k tokens must lie in the document.

  Returns:
    chunks_BCK, chunk_len_BC, encoder_BCM, encoder_len_BC of the batch format,
    and truncated_BC as in `Chunks`.
  """
  shape = (len(doc_B), num_chunks)
  first_B = corpus.token_offsets[doc_B] + start_B
  token_BCK = first_B[:, None, None] + np.arange(
    num_chunks * chunk_size
  ).reshape(num_chunks, chunk_size)
  # Spans in bytes of the whole corpus text; the last one ends where the next
  # token begins, or with the document.
  bound_BC1 = first_B[:, None] + np.arange(num_chunks + 1) * chunk_size
  text_B = corpus.text_offsets[doc_B]
  at_end_B1 = bound_BC1 >= corpus.token_offsets[doc_B + 1][:, None]
  inside = np.minimum(bound_BC1, len(corpus.starts) - 1)
  bytes_BC1 = np.where(
    at_end_B1,
    corpus.text_offsets[doc_B + 1][:, None],
    text_B[:, None] + corpus.starts[inside],
  )
  spans = (bytes_BC1[:, :-1].ravel(), bytes_BC1[:, 1:].ravel())
  if encoder_tokenizer.name == 'bytes':
    encoder_NM, encoder_len_N, truncated_N = _encode_bytes(
      corpus.text, *spans, encoder_tokenizer, max_encoder_tokens
    )
  else:
    text = np.asarray(corpus.text)  # slices of a memmap are dear
    texts = [
      text[a:b].tobytes().decode('utf-8') for a, b in zip(*spans, strict=True)
    ]
    encoder_NM, encoder_len_N, truncated_N = encode_spans(
      texts, encoder_tokenizer, max_encoder_tokens
    )
  return {
    'chunks_BCK': corpus.tokens[token_BCK].astype(np.int32),
    'chunk_len_BC': np.full(shape, chunk_size, np.int32),
    'encoder_BCM': encoder_NM.reshape(*shape, max_encoder_tokens),
    'encoder_len_BC': encoder_len_N.reshape(shape),
  }, truncated_N.reshape(shape)


def _encode_bytes(
  text: np.ndarray,
  begin_N: np.ndarray,
  end_N: np.ndarray,
  tokenizer: Tokenizer,
  max_tokens: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`encode_spans` for the byte tokenizer: its ids are the text's bytes."""
  full_N = end_N - begin_N
  size_N = np.minimum(full_N, max_tokens - 2)
  ids_NM = np.full((len(begin_N), max_tokens), tokenizer.pad_id, np.int32)
  step = np.arange(max_tokens - 2)
  # As int32 before the padding goes in: its id does not fit into a byte.
  body_NM = text[np.minimum(begin_N[:, None] + step, len(text) - 1)].astype(
    np.int32
  )
  ids_NM[:, 1:-1] = np.where(step < size_N[:, None], body_NM, tokenizer.pad_id)
  ids_NM[:, 0] = tokenizer.cls_id
  ids_NM[np.arange(len(begin_N)), size_N + 1] = tokenizer.sep_id
  len_N = (size_N + 2).astype(np.int32)
  return ids_NM, len_N, full_N > size_N
