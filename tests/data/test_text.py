"""Every kind of source, and what becomes of what cannot be read."""

import errno
import gzip
import importlib
import json
import os
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python import array_record_module

from refrag_jax.data import tokenizers
from refrag_jax.data.text import corpus
from refrag_jax.data.text import sources as text
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

  (tmp_path / 'bad.txt').write_bytes(b'\xff\xf0')
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


def write(path, *texts, pack=lambda data: data):
  path.parent.mkdir(parents=True, exist_ok=True)
  data = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  path.write_bytes(pack(data.encode()))
  return path


def test_linked_files_and_directories_are_read_once(tmp_path):
  data = tmp_path / 'data'
  write(tmp_path / 'away' / 'shards' / 'a.jsonl', 'one')
  write(tmp_path / 'blobs' / '7f3a', 'two')
  data.mkdir()
  (data / 'linked').symlink_to(tmp_path / 'away')
  (data / 'again').symlink_to(tmp_path / 'away')
  (data / 'b.jsonl').symlink_to(tmp_path / 'blobs' / '7f3a')
  (tmp_path / 'away' / 'back').symlink_to(data)  # a loop
  assert sorted(read(data)[0]) == ['one', 'two']


def test_hidden_files_and_notes_are_no_data(tmp_path):
  """AppleDouble's ._a.jsonl, a .git, LICENSE.txt; said where not hidden."""
  write(
    tmp_path / 'en' / 'c4-train.00000-of-01024.json.gz', 'x', pack=gzip.compress
  )
  write(tmp_path / 'a.jsonl', 'y')
  (tmp_path / '._a.jsonl').write_bytes(b'\x00\x05\x16\x07')
  write(tmp_path / '.git' / 'b.jsonl', 'no')
  for name in ('LICENSE.txt', 'README.txt', 'sub.bin'):
    (tmp_path / name).write_text('of no use')
  texts, skipped = read(tmp_path)
  assert sorted(texts) == ['x', 'y']
  assert skipped == {
    'files of unknown kind (first: sub.bin)': 1,
    'files about the data (first: LICENSE.txt)': 2,
  }
  assert text.described(skipped).startswith('1 files of unknown kind (first: ')
  # Alone they may be what is meant.
  (tmp_path / 'only').mkdir()
  (tmp_path / 'only' / 'README.txt').write_text('A manual.')
  assert read(tmp_path / 'only')[0] == ['A manual.']


def test_what_was_left_out_is_known_of_a_cached_index_too(tmp_path):
  write(tmp_path / 'in' / 'a.jsonl', *(f'text {i} ' * 30 for i in range(20)))
  (tmp_path / 'in' / 'b.csv').write_text('of no use')
  for _ in range(2):
    prepared = corpus.prepare(
      (str(tmp_path / 'in'),), (1.0,), tokenizers.load('bytes'),
      str(tmp_path / 'cache'), 0.25,
    )  # fmt: skip
    said = prepared.summary()
    assert 'left out: 1 files of unknown kind (first: b.csv)' in said


@pytest.mark.parametrize(
  'name', ['a.txt', 'a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.array_record']
)
def test_pointers_of_git_lfs_are_refused_by_name(tmp_path, name):
  path = tmp_path / name
  path.write_text(
    'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n'
  )
  for source in (path, tmp_path):
    with pytest.raises(
      UserError, match=f'{path} is a Git LFS pointer.*lfs pul'
    ):
      read(source)


def test_links_to_nothing_and_to_themselves_are_named(tmp_path):
  write(tmp_path / 'a.jsonl', 'x')
  link = tmp_path / 'b.jsonl'
  link.symlink_to(tmp_path / 'gone.jsonl')
  with pytest.raises(UserError, match=f'{link} is a link to .*gone.jsonl'):
    read(tmp_path)
  with pytest.raises(UserError, match=f'{link} is a link to .*gone.jsonl'):
    read(link)
  link.unlink()
  link.symlink_to(tmp_path / 'c.jsonl')
  (tmp_path / 'c.jsonl').symlink_to(link)
  with pytest.raises(UserError, match='Too many levels'):
    read(tmp_path)


def test_a_directory_that_cannot_be_read_is_not_an_empty_one(
  tmp_path, monkeypatch
):
  write(tmp_path / 'a.jsonl', 'x')
  (tmp_path / 'secret').mkdir()
  scandir = os.scandir

  def refusing(path):
    if os.path.basename(path) == 'secret':
      raise PermissionError(errno.EACCES, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refusing)
  with pytest.raises(UserError, match='secret cannot be read .Permission'):
    read(tmp_path)


def test_numbers_of_any_length_are_numbers(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "fine", "n": ' + '7' * 5000 + '}\n')
  assert read(path) == (['fine'], {})


def test_long_windows_are_no_damage(tmp_path):
  """What `zstd --long=31` writes: a window above what is taken by default."""
  parameters = zstandard.ZstdCompressionParameters(
    window_log=28, enable_ldm=True
  )
  packer = zstandard.ZstdCompressor(compression_params=parameters)
  pack = lambda data: b''.join(
    (part := packer.compressobj()) and (part.compress(data), part.flush())
  )
  path = write(tmp_path / 'a.jsonl.zst', 'far', pack=pack)
  frame = zstandard.get_frame_parameters(path.read_bytes())
  assert frame.window_size == 1 << 28
  assert read(path)[0] == ['far']


def test_a_json_array_is_told_from_records(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('[\n {"text": "x"}\n]')
  with pytest.raises(UserError, match='is one JSON array: .*jq -c'):
    read(path)
  assert read(write(tmp_path / 'b.json', 'x'))[0] == ['x']


def test_utf_16_is_told_from_damage(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "x"}', encoding='utf-16')
  with pytest.raises(UserError, match='is UTF-16, not UTF-8'):
    read(path)
  path = tmp_path / 'a.txt'
  path.write_text('x', encoding='utf-16')
  assert read(path) == ([], {'UTF-16, not UTF-8 (see iconv)': 1})


@pytest.mark.parametrize(
  'kind',
  [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
    pa.large_binary(), pa.dictionary(pa.int32(), pa.string()),
  ],
  ids=str,
)  # fmt: skip
def test_every_kind_of_arrow_string_is_text(tmp_path, kind):
  column = pa.array(['é', 'b', 'é'], pa.string())
  if pa.types.is_dictionary(kind):
    column = column.dictionary_encode()
  elif kind == pa.binary_view():
    column = column.cast(pa.binary())
  column = column.cast(kind)
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'text': column}), path)
  assert read(path)[0] == ['é', 'b', 'é']
