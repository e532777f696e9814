"""Every kind of source, and what becomes of what cannot be read."""

import gzip
import importlib
import json
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python import array_record_module

from refrag_jax.data import text
from refrag_jax.errors import UserError

GOOD = ['one', 'zwölf 🦜', 'three\nlines\n']


def read(source):
  skipped = Counter()
  return [d.text for d in text.documents(str(source), skipped)], dict(skipped)


def jsonl(records):
  return b''.join(json.dumps({'text': t}).encode() + b'\n' for t in records)


def array_record(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


def test_txt_files_of_a_directory(tmp_path):
  (tmp_path / 'sub').mkdir()
  for name, t in zip(['b.txt', 'a.txt', 'sub/c.txt'], GOOD, strict=True):
    (tmp_path / name).write_text(t, encoding='utf-8')
  (tmp_path / 'notes.md').write_text('not mine')
  documents = list(text.documents(str(tmp_path), Counter()))
  assert [d.name for d in documents] == ['a.txt', 'b.txt', 'sub/c.txt']
  assert [d.text for d in documents] == [GOOD[1], GOOD[0], GOOD[2]]


def test_lone_txt_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
  book = ''.join(f'Paragraph {i} of the book.\n\n' for i in range(3000))
  path = tmp_path / 'book.txt'
  path.write_text('\ufeff' + book, encoding='utf-8')
  sections, _ = read(path)
  assert len(sections) == text.NUM_SECTIONS
  assert ''.join(sections) == book
  assert all(s.endswith('.\n\n') for s in sections)
  path.write_text('x' * 50_000)  # not a single line end
  sections, _ = read(path)
  assert ''.join(sections) == 'x' * 50_000
  assert len(sections) == text.NUM_SECTIONS


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.jsonl.zst'])
def test_jsonl(tmp_path, suffix):
  pack = {
    '.jsonl': bytes,
    '.jsonl.gz': gzip.compress,
    '.jsonl.zst': zstandard.ZstdCompressor().compress,
  }[suffix]
  path = tmp_path / f'a{suffix}'
  # Two members (frames), as `cat a.gz b.gz` leaves them, and a line across.
  data = jsonl(GOOD)
  path.write_bytes(pack(data[:20]) + pack(data[20:]))
  assert read(path) == (GOOD, {})


def test_parquet_and_array_record(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'text': GOOD, 'id': [1, 2, 3]}), path)
  assert read(path) == (GOOD, {})
  path = tmp_path / 'a.array_record'
  records = [GOOD[0].encode(), jsonl(GOOD[1:2]), b'{not json']
  array_record(path, records)
  assert read(path) == ([GOOD[0], GOOD[1], '{not json'], {})


def test_stdlib():
  documents = list(text.documents('stdlib', Counter()))
  assert len(documents) > 100
  assert sum(len(d.text) for d in documents) > 1_000_000


@pytest.fixture
def tfds_directory(tmp_path, monkeypatch):
  """A data set prepared without TensorFlow; its builder needs a package."""
  package = tmp_path / 'small_text'
  package.mkdir()
  (package / '__init__.py').write_text('')
  (package / 'small_text_dataset_builder.py').write_text("""
import tensorflow_datasets as tfds

class Builder(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {}
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True,
        features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))
  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(['one', 'zwölf', ' ']),
            'test': self._generate_examples(['three'])}
  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {'text': text}
""")
  monkeypatch.syspath_prepend(str(tmp_path))
  module = importlib.import_module('small_text.small_text_dataset_builder')
  builder = module.Builder(
    data_dir=str(tmp_path / 'data'), file_format='array_record'
  )
  builder.download_and_prepare()
  return builder.data_path


def test_tfds_without_tensorflow(tfds_directory):
  source = f'tfds:{tfds_directory}'
  assert read(source) == (['one', 'zwölf'], {text.NO_TEXT: 1})
  assert read(f'{source}:test') == (['three'], {})
  assert len(text.stat(source)) > 2
  with pytest.raises(UserError, match='splits are train, test'):
    read(f'{source}:dev')
  assert 'tensorflow' not in sys.modules


def test_tfds_unknown():
  with pytest.raises(UserError, match=r'no_such_set.*array_record'):
    read('tfds:no_such_set')


def test_unusable_records_are_skipped_and_counted(tmp_path):
  lines = [
    b'{"text": "fine"}',
    b'{"text": "bad \xff byte"}',
    b'{"text": "half a pair: \\ud800"}',
    b'{"body": "no text field"}',
    b'{"text": 7}',
    b'{"text": "  \\n"}',
    b'[1]',
    b'{"text": "cut o',
    b'',
    b'{"text": "also fine"}',
  ]
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\n'.join(lines))
  assert read(path) == (
    ['fine', 'also fine'],
    {text.NOT_UTF8: 2, text.NO_TEXT: 4, text.NOT_JSON: 1},
  )

  (tmp_path / 'bad.txt').write_bytes(b'\xff\xfe')
  assert read(tmp_path / 'bad.txt') == ([], {text.NOT_UTF8: 1})

  array_record(tmp_path / 'a.array_record', [b'\xff', b'{"body": 1}', b'ok'])
  assert read(tmp_path / 'a.array_record') == (
    ['ok'],
    {text.NOT_UTF8: 1, text.NO_TEXT: 1},
  )

  strings = pa.array([b'ok', b'\xff', None, b''], pa.binary())
  strings = pa.Array.from_buffers(pa.string(), 4, strings.buffers())
  pq.write_table(pa.table({'text': strings}), tmp_path / 'a.parquet')
  assert read(tmp_path / 'a.parquet') == (
    ['ok'],
    {text.NOT_UTF8: 1, text.NO_TEXT: 2},
  )


def test_damaged_files_are_named(tmp_path):
  body = jsonl(f'{i} {i * i} some text' for i in range(5000))
  for suffix, data in (
    ('gz', gzip.compress(body)),
    ('zst', zstandard.ZstdCompressor(write_checksum=True).compress(body)),
  ):
    path = tmp_path / f'a.jsonl.{suffix}'
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r'jsonl.*damaged after line \d+'):
      read(path)
    path.write_bytes(data[:30] + b'garbage' + data[37:])
    with pytest.raises(UserError, match=r'jsonl.*damaged after line \d+'):
      read(path)

  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'text': [f'text {i}' for i in range(5000)]}), path)
  data = path.read_bytes()
  path.write_bytes(data[:-100])
  with pytest.raises(UserError, match=r'a.parquet: damaged after record 0'):
    read(path)
  path.write_bytes(data[:50] + bytes(500) + data[550:])
  with pytest.raises(UserError, match=r'a.parquet: damaged after record 0'):
    read(path)

  path = tmp_path / 'a.array_record'
  array_record(path, [GOOD[i % 2].encode() for i in range(5000)])
  path.write_bytes(path.read_bytes()[:-70_000])
  with pytest.raises(UserError, match=r'a.array_record: damaged'):
    read(path)


def test_parquet_without_text(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'body': GOOD}), path)
  with pytest.raises(UserError, match='no column `text`; it has body'):
    read(path)
  pq.write_table(pa.table({'text': [1, 2]}), path)
  with pytest.raises(UserError, match='column `text` holds int64'):
    read(path)


def test_not_a_source(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    read(tmp_path / 'nothing.txt')
  with pytest.raises(UserError, match='no file in it ends in'):
    read(tmp_path)
  (tmp_path / 'a.pdf').write_bytes(b'')
  with pytest.raises(UserError, match='unknown kind of text'):
    read(tmp_path / 'a.pdf')
