"""Chunks: k decoder tokens, and exactly the text they stand for."""

import dataclasses
import json

import numpy as np
import pytest

from refrag_jax.data import chunking, tokenizers
from refrag_jax.data.text import corpus

BYTES = tokenizers.load('bytes')
K, M = 4, 6
TEXTS = [
  'ascii only, twenty-two',
  'é🦜 zwölf Boxkämpfer 🦜🦜',
  '🦜',
  'abc',
  '    ',
]


def pairs(name='pairs'):
  """A tokenizer of character pairs, of which the second may be white space."""

  def encode(text):
    ids = [ord(text[i]) % 200 for i in range(0, len(text), 2)]
    starts = range(0, len(text), 2)
    return np.asarray(ids, np.int32), np.asarray(starts, np.int32)

  return dataclasses.replace(
    BYTES,
    name=name,
    encode_batch=lambda texts: [encode(t) for t in texts],
    ids_batch=lambda texts: [encode(t)[0] for t in texts],
  )


@pytest.mark.parametrize('text', TEXTS)
@pytest.mark.parametrize('decoder', [BYTES, pairs()])
@pytest.mark.parametrize('encoder', [BYTES, pairs()])
def test_chunks_partition_the_passage(text, decoder, encoder):
  out = chunking.chunk_passage(text, decoder, encoder, K, 40)
  ids, starts = decoder.encode(text)
  assert len(out.chunks_CK) == -(-len(ids) // K)
  # The tokens, in order, with the last chunk short.
  flat = [t for row, n in zip(*out[:2], strict=True) for t in row[:n]]
  assert flat == ids.tolist()
  assert (out.chunk_len_C[:-1] == K).all()
  assert (out.chunks_CK[-1, out.chunk_len_C[-1] :] == decoder.pad_id).all()
  # The text, in order, none twice, and the encoder's ids of just that text.
  spans = [text[a:b] for a, b in out.spans_C2]
  assert ''.join(spans) == text
  assert out.spans_C2[:, 0].tolist() == starts[::K].tolist()
  for c, span in enumerate(spans):
    want = [encoder.cls_id, *encoder.encode(span)[0], encoder.sep_id]
    assert out.encoder_CM[c, : out.encoder_len_C[c]].tolist() == want
    assert (out.encoder_CM[c, len(want) :] == encoder.pad_id).all()
  assert not out.truncated_C.any()


def test_a_character_of_many_tokens_leaves_empty_spans():
  out = chunking.chunk_passage('🦜🦜', BYTES, BYTES, 2, M)
  assert out.spans_C2.tolist() == [[0, 1], [1, 1], [1, 2], [2, 2]]
  assert out.encoder_len_C.tolist() == [6, 2, 6, 2]
  assert out.encoder_CM[1, :2].tolist() == [BYTES.cls_id, BYTES.sep_id]


def test_truncation_is_reported_and_keeps_sep():
  out = chunking.chunk_passage('aaéébb', BYTES, BYTES, K, 5)
  assert out.truncated_C.tolist() == [True, True]
  assert out.encoder_len_C.tolist() == [5, 5]
  assert (out.encoder_CM[:, 0] == BYTES.cls_id).all()
  assert (out.encoder_CM[:, -1] == BYTES.sep_id).all()
  out = chunking.chunk_passage('aaéé', BYTES, BYTES, K, M)
  assert out.truncated_C.tolist() == [False, False]


def test_passage_of_zero_tokens():
  out = chunking.chunk_passage('', BYTES, BYTES, K, M)
  assert [len(a) for a in out] == [0] * 6
  out = chunking.chunk_passage('', BYTES, BYTES, K, M, max_chunks=2)
  assert out.chunk_len_C.tolist() == out.encoder_len_C.tolist() == [0, 0]


def test_a_fixed_number_of_chunks():
  free = chunking.chunk_passage('abcdefghij', BYTES, BYTES, K, M)
  wide = chunking.chunk_passage('abcdefghij', BYTES, BYTES, K, M, 5)
  for got, want in zip(wide, free, strict=True):
    np.testing.assert_array_equal(got[:3], want)
  assert wide.chunk_len_C.tolist() == [4, 4, 2, 0, 0]
  assert wide.encoder_len_C.tolist() == [6, 6, 4, 0, 0]
  assert (wide.chunks_CK[3:] == BYTES.pad_id).all()
  narrow = chunking.chunk_passage('abcdefghij', BYTES, BYTES, K, M, 2)
  for got, want in zip(narrow, free, strict=True):
    np.testing.assert_array_equal(got, want[:2])


@pytest.mark.parametrize('decoder', [BYTES, pairs()])
@pytest.mark.parametrize('max_tokens', [4, M, 20])
def test_windows_of_a_corpus(tmp_path, decoder, max_tokens):
  """Both ways through the corpus give what the text itself gives."""
  path = tmp_path / 'a.jsonl'
  texts = [t for t in TEXTS if t.strip()] + ['x' * 50]
  lines = [json.dumps({'text': t}) for t in texts]
  path.write_text('\n'.join(lines), encoding='utf-8')
  decoder = dataclasses.replace(decoder, fingerprint=decoder.name)
  made = corpus.prepare(
    [str(path)], [1.0], decoder, str(tmp_path / 'cache'), 0.0
  )
  plain = dataclasses.replace(BYTES, name='slow')  # no short cut by that name
  doc, start, num = [], [], 2
  for d, n in enumerate(np.diff(made.token_offsets)):
    for s in range(n - num * K + 1):  # up to the document's very end
      doc.append(d)
      start.append(s)
  assert len(doc) > 20
  args = (made, np.asarray(doc), np.asarray(start), num, K)
  fast, fast_cut = chunking.chunk_windows(*args, BYTES, max_tokens)
  slow, slow_cut = chunking.chunk_windows(*args, plain, max_tokens)
  assert fast.keys() == slow.keys()
  for name in fast:
    np.testing.assert_array_equal(fast[name], slow[name])
    assert fast[name].dtype == np.int32
  np.testing.assert_array_equal(fast_cut, slow_cut)
  assert fast_cut.any() == (max_tokens < 20)

  for b, (d, s) in enumerate(zip(doc, start, strict=True)):
    ids, starts = decoder.encode(texts[d])
    bounds = [*starts, len(texts[d])]
    for c in range(num):
      first = s + c * K
      want = ids[first : first + K]
      np.testing.assert_array_equal(fast['chunks_BCK'][b, c], want)
      span = texts[d][bounds[first] : bounds[first + K]]
      inner = list(span.encode())[: max_tokens - 2]
      got = fast['encoder_BCM'][b, c, : fast['encoder_len_BC'][b, c]]
      assert got.tolist() == [BYTES.cls_id, *inner, BYTES.sep_id]
