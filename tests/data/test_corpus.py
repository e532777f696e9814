"""The token index: what is in it, its split, its cache, and bad input."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest

from refrag_jax.data import chunking, tokenizers, windows
from refrag_jax.data.text import corpus, index
from refrag_jax.data.text import sources as text_lib
from refrag_jax.errors import UserError

BYTES = tokenizers.load('bytes')
# Every second one needs more than one byte a character.
TEXTS = [f'{"Zwölf" if i % 2 else "Twelve"} of {i}\n' * 9 for i in range(60)]


def write(path, texts):
  lines = [json.dumps({'text': t}) for t in texts]
  path.write_text('\n'.join(lines), encoding='utf-8')
  return str(path)


def prepare(source, cache, fraction=0.2, tokenizer=BYTES):
  sources = source if isinstance(source, list) else [source]
  weights = [1.0] * len(sources)
  return corpus.prepare(sources, weights, tokenizer, str(cache), fraction)


def words():
  """A tokenizer of white-space separated words; spaces alone are no token."""

  def encode(text):
    starts, end = [], 0
    for word in text.split():
      starts.append(end)
      end = text.index(word, end) + len(word)
    ids = [len(word) for word in text.split()]
    return np.asarray(ids, np.int32), np.asarray(starts, np.int32)

  return dataclasses.replace(
    BYTES,
    name='words',
    vocab_size=100_000,  # needs more than 16 bits
    fingerprint='words',
    encode_batch=lambda texts: [encode(t) for t in texts],
  )


def test_documents_come_back(tmp_path):
  made = prepare(write(tmp_path / 'a.jsonl', TEXTS), tmp_path / 'cache')
  assert made.tokens.dtype == np.uint16
  for d in range(len(TEXTS)):
    begin, end = made.token_offsets[d : d + 2]
    assert made.document_text(d) == TEXTS[d]
    ids, starts = BYTES.encode(TEXTS[d])
    np.testing.assert_array_equal(made.tokens[begin:end], ids)
    in_bytes = [len(TEXTS[d][:s].encode()) for s in starts]
    np.testing.assert_array_equal(made.starts[begin:end], in_bytes)


def test_many_tokens_and_batches(tmp_path, monkeypatch):
  monkeypatch.setattr(index, 'BATCH', 7)
  made = prepare(
    write(tmp_path / 'a.jsonl', TEXTS), tmp_path / 'cache', tokenizer=words()
  )
  assert made.tokens.dtype == np.int32
  assert len(made.tokens) == 27 * len(TEXTS)
  starts = made.starts[made.token_offsets[1] : made.token_offsets[1] + 4]
  assert starts.tolist() == [0, 6, 9, 11]  # 'ö' is two bytes


def test_split_is_by_content(tmp_path):
  first = prepare(write(tmp_path / 'a.jsonl', TEXTS), tmp_path / 'cache')
  shuffled = prepare(
    write(tmp_path / 'b.jsonl', TEXTS[::-1] + ['one more']), tmp_path / 'cache'
  )

  def heldout(made):
    docs = made.documents('heldout')
    assert len(docs) + len(made.documents('train')) == len(made.source)
    return {made.document_text(d) for d in docs}

  assert heldout(first) == heldout(shuffled) - {'one more'}
  assert 5 < len(heldout(first)) < 25  # of 60, at 0.2
  assert heldout(first) == {t for t in TEXTS if corpus.is_heldout(t, 0.2)}
  everything = prepare(str(tmp_path / 'a.jsonl'), tmp_path / 'cache', 1.0)
  assert not len(everything.documents('train'))
  nothing = prepare(str(tmp_path / 'a.jsonl'), tmp_path / 'cache', 0.0)
  assert not len(nothing.documents('heldout'))


@pytest.mark.parametrize('fraction', [1e-9, 1 - 1e-9])
def test_both_sides_of_a_tiny_corpus_are_filled(tmp_path, fraction):
  source = write(tmp_path / 'a.jsonl', ['the first text', 'the second text'])
  made = prepare(source, tmp_path / 'cache', fraction)
  assert len(made.documents('heldout')) == len(made.documents('train')) == 1


def test_one_document_cannot_be_split(tmp_path):
  source = write(tmp_path / 'a.jsonl', ['only this'])
  with pytest.raises(UserError, match=r'not one held-out document.*needs two'):
    prepare(source, tmp_path / 'cache')
  # Beside a source with more it is trained on.
  other = write(tmp_path / 'b.jsonl', TEXTS)
  made = prepare([source, other], tmp_path / 'cache')
  assert made.documents('train', 0).tolist() == [0]


def test_lines_on_both_sides_are_dropped_from_both(tmp_path):
  shared = 'This license text stands at the top of every file.\n'
  short = 'Returns: a value\n'
  texts = [f'{shared}  Line {i} stands here and nowhere else.\n{short}'
           for i in range(40)]  # fmt: skip
  made = prepare(
    write(tmp_path / 'a.jsonl', [*texts, f'\t{shared}']), tmp_path / 'cache'
  )
  assert len(made.documents('heldout')) > 0
  for d in range(len(made.source)):
    document = made.document_text(d)
    assert shared.strip() not in document
    assert document.endswith(f'and nowhere else.\n{short}')
  counts = made.meta['sources'][0]
  assert counts['shared_lines'] == 41
  assert counts['skipped'] == {index.SHARED: 1}
  assert '41 lines dropped' in made.summary()
  # Nothing is dropped where there are no two sides.
  whole = prepare(str(tmp_path / 'a.jsonl'), tmp_path / 'cache', 1.0)
  assert whole.document_text(0) == texts[0]


def test_cache(tmp_path, monkeypatch):
  cache = tmp_path / 'cache'
  source = write(tmp_path / 'a.jsonl', TEXTS)
  made = prepare(source, cache)
  # Same text by another name: read, hashed, and found.
  again = prepare(write(tmp_path / 'b.jsonl', TEXTS), cache)
  assert again.directory == made.directory
  assert again.hash == made.hash
  # Another text, tokenizer or setting: another index.
  others = [
    prepare(write(tmp_path / 'c.jsonl', TEXTS[1:]), cache),
    prepare(source, cache, 0.5),
    prepare(source, cache, tokenizer=words()),
  ]
  assert len({made.directory, *(o.directory for o in others)}) == 4
  assert len({made.hash, *(o.hash for o in others)}) == 4
  assert [n for n in os.listdir(cache) if n.startswith('.')] == []
  # The same files: not even read.
  monkeypatch.setattr(text_lib, 'read', None)
  assert prepare(source, cache).hash == made.hash
  os.utime(source, (1, 1))
  with pytest.raises(TypeError):
    prepare(source, cache)


def test_damaged_index_is_built_again(tmp_path):
  source = write(tmp_path / 'a.jsonl', TEXTS)
  made = prepare(source, tmp_path / 'cache')
  path = os.path.join(made.directory, 'starts.npy')
  want = np.array(made.starts)
  for damage in (lambda: os.unlink(path), lambda: os.truncate(path, 200)):
    damage()
    again = prepare(source, tmp_path / 'cache')
    np.testing.assert_array_equal(again.starts, want)


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
  source = write(tmp_path / 'a.jsonl', TEXTS)
  *stages, closing = index.STAGES

  def slow(job, unit, tokenizer):
    monkeypatch.setattr(index, 'STAGES', (*stages, closing))
    index.STAGES[-1].run(job, unit, tokenizer)  # the other process
    closing.run(job, unit, tokenizer)

  slowly = (*stages, closing._replace(run=slow))
  monkeypatch.setattr(index, 'STAGES', slowly)
  made = prepare(source, tmp_path / 'cache')
  assert made.document_text(3) == TEXTS[3]


def test_disk_errors_pass_and_leave_nothing(tmp_path, monkeypatch):
  source = write(tmp_path / 'a.jsonl', TEXTS)
  cache = tmp_path / 'cache'

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')

  for owner, name in (
    (os, 'makedirs'),
    (np, 'savez'),
    (np, 'save'),
    (os, 'fsync'),
    (os, 'replace'),
    (os, 'rename'),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, full)
      with pytest.raises(OSError, match='No space left'):
        prepare(source, cache)
    # Nothing but whole shards, for the next start.
    left = [n for _, _, names in os.walk(cache) for n in names]
    assert not [n for n in left if n.startswith('.')]
    if cache.exists():
      assert all(n.startswith('.building-') for n in os.listdir(cache))
  assert len(prepare(source, cache).source) == len(TEXTS)
  assert len(os.listdir(cache)) == 2


def test_empty_and_unusable_corpora(tmp_path):
  source = write(tmp_path / 'a.jsonl', [])
  with pytest.raises(UserError, match=r'not one document .*it is empty'):
    prepare(source, tmp_path / 'cache')
  (tmp_path / 'b.jsonl').write_bytes(b'{"body": 1}\n{"text": "\xff"}\n')
  with pytest.raises(
    UserError, match='left out: 1 with no text, 1 with invalid UTF-8'
  ):
    prepare(str(tmp_path / 'b.jsonl'), tmp_path / 'cache')
  # One good source does not excuse another one: its weight would be a lie.
  good = write(tmp_path / 'c.jsonl', TEXTS)
  with pytest.raises(UserError, match=r'a.jsonl: not one training document'):
    prepare([good, source], tmp_path / 'cache')
  assert os.listdir(tmp_path / 'cache') == []


def test_unusable_documents_are_counted(tmp_path):
  def encode(texts):
    return [BYTES.encode('' if 'of 3\n' in t else t) for t in texts]

  some = dataclasses.replace(BYTES, fingerprint='some', encode_batch=encode)
  source = write(tmp_path / 'a.jsonl', [*TEXTS, '', ' '])
  made = prepare(source, tmp_path / 'cache', tokenizer=some)
  assert made.meta['sources'][0]['skipped'] == {
    text_lib.NO_TEXT: 2,
    index.ZERO_TOKENS: 1,
  }
  assert '2 with no text, 1 with zero tokens' in made.summary()
  assert len(made.source) == len(TEXTS) - 1
  assert made.document_text(3) == TEXTS[4]


def test_settings(tmp_path):
  source = write(tmp_path / 'a.jsonl', TEXTS)
  for sources, weights, fraction, message in (
    ([], [], 0.1, 'names no source'),
    ([source], [1, 1], 0.1, 'one positive weight for each of the 1'),
    ([source], [0], 0.1, 'one positive weight'),
    ([source], [1], 1.5, 'from 0 to 1'),
  ):
    with pytest.raises(UserError, match=message):
      corpus.prepare(sources, weights, BYTES, str(tmp_path / 'c'), fraction)


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """A corpus of three sources of 60, 7 and 25 documents."""
  folder = tmp_path_factory.mktemp('three')
  texts = (
    TEXTS,
    [f'seven and {i}, plain.' for i in range(7)],
    [f'Ünïcode {i} of the last source' * (1 + i % 3) for i in range(25)],
  )
  sources = [
    write(folder / f'{name}.jsonl', part)
    for name, part in zip('abc', texts, strict=True)
  ]
  return prepare(sources, folder / 'cache', 0.4), texts


@pytest.mark.parametrize('source', [0, 1, 2])
def test_a_part_is_its_source_alone(three, source):
  whole, texts = three
  part = whole.part(source)
  assert part.sources == (whole.sources[source],)
  assert part.weights == (1.0,)
  assert len(part.source) == len(texts[source])
  assert not part.source.any()
  assert f'{part.sources[0]} (100%)' in part.summary()
  (first, *_) = np.flatnonzero(whole.source == source)
  for split in ('train', 'heldout'):
    docs = part.documents(split)
    np.testing.assert_array_equal(docs + first, whole.documents(split, source))
    assert docs.tolist() == part.documents(split, 0).tolist()
  for d, text in enumerate(texts[source]):
    assert part.document_text(d) == text
    mine, theirs = (
      slice(*corpus.token_offsets[i : i + 2])
      for corpus, i in ((part, d), (whole, d + first))
    )
    np.testing.assert_array_equal(part.tokens[mine], BYTES.encode(text)[0])
    np.testing.assert_array_equal(part.tokens[mine], whole.tokens[theirs])
    np.testing.assert_array_equal(part.starts[mine], whole.starts[theirs])


def test_parts_are_all_of_the_corpus(three):
  whole, _ = three
  parts = [whole.part(i) for i in range(3)]
  assert sum(len(part.source) for part in parts) == len(whole.source)
  for split in ('train', 'heldout'):
    total = sum(len(part.documents(split)) for part in parts)
    assert total == len(whole.documents(split))
  # Of one source, a part is the corpus.
  alone = parts[0].part(0)
  np.testing.assert_array_equal(alone.token_offsets, parts[0].token_offsets)


@pytest.mark.parametrize('source', [0, 1, 2])
def test_windows_of_a_part_never_leave_their_source(three, source):
  """Up to the last token of its last document, chunks' text included."""
  whole, texts = three
  part = whole.part(source)
  docs = part.documents('heldout')
  table = windows.windows(part, docs, 4, 3)
  doc_B, start_B = windows.locate(table, windows.spread(table, 10_000, 0))
  assert set(doc_B.tolist()) == set(docs.tolist())
  batch, _ = chunking.chunk_windows(part, doc_B, start_B, 1, 4, BYTES, 9)
  at_B = part.token_offsets[doc_B] + start_B
  for b, d in enumerate(doc_B):
    text = texts[source][d].encode()
    tokens = part.tokens[at_B[b] : at_B[b] + 7]
    begin = start_B[b]
    assert bytes(tokens.tolist()) == text[begin : begin + 7]
    length = batch['encoder_len_BC'][b, 0]
    ids = batch['encoder_BCM'][b, 0, 1 : length - 1]
    assert bytes(ids.tolist()) in text
