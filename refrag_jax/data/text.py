"""Documents from whatever the user has: one function, `documents`.

A source is one of

  stdlib                     the running interpreter's own documentation
  PATH.txt                   one document (the only file: cut into sections)
  PATH.jsonl[.gz|.zst]       a record a line, its `text` field
  PATH.parquet               a record a row, its `text` column
  PATH.array_record          a record is JSON with `text`, or the text itself
  DIRECTORY                  every such file below it, by name
  tfds:NAME[/CONFIG][:SPLIT], tfds:/DIRECTORY[:SPLIT]

A record that cannot be used is skipped and counted by its reason; a file that
cannot be read at all ends the run with a sentence that names it.
"""

import dataclasses
import functools
import gzip
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

from refrag_jax.errors import UserError

SUFFIXES = (
  '.txt',
  '.jsonl',
  '.jsonl.gz',
  '.jsonl.zst',
  '.parquet',
  '.array_record',
  '.arrayrecord',
)
NOT_UTF8 = 'invalid UTF-8'
NOT_JSON = 'invalid JSON'
NO_TEXT = 'no text'  # the field is missing, not a string, or only white space
# A lone .txt (a book, a log) is cut, because the held-out split and standard
# errors need several documents; sections shorter than this teach nothing.
NUM_SECTIONS = 20
MIN_SECTION = 2000


@dataclasses.dataclass(frozen=True)
class Document:
  name: str
  text: str


def documents(
  source: str, skipped: Counter, paths: Sequence[str] | None = None
) -> Iterator[Document]:
  """Yields a source's documents, and counts in `skipped` what it left out.

  Args:
    paths: of its files, read these alone; () reads none, and counts what is
      left out whatever they hold.
  """
  if source == 'stdlib':
    from refrag_jax.data import stdlib

    yield from (Document(d.name, d.text) for d in stdlib.documents())
    return
  if source.startswith('tfds:'):
    yield from _documents(_tfds(source), source, skipped)
    return
  found = files(source)
  for path in found if paths is None else paths:
    name = (
      os.path.relpath(path, source)
      if path != source
      else (os.path.basename(path))
    )
    yield from read(path, name, len(found) == 1, skipped)


def read(
  path: str,
  name: str,
  alone: bool,
  skipped: Counter,
  span: tuple[int, int | None] = (0, None),
) -> Iterator[Document]:
  """Yields the documents of one file.

  Args:
    name: what they are called by.
    alone: whether the source is this file alone.
    span: of a file that `has_spans`, the lines that begin in these bytes.
  """
  if path.endswith('.txt'):
    yield from _txt(path, name, alone, skipped)
  elif path.endswith('.parquet'):
    yield from _documents(_parquet(path), name, skipped)
  elif path.endswith(('.array_record', '.arrayrecord')):
    yield from _documents(_array_record(path), name, skipped)
  else:
    yield from _documents(_jsonl(path, span), name, skipped)


def has_spans(path: str) -> bool:
  """Whether a file can be read in spans: it has a JSON object a line."""
  if not path.endswith('.jsonl'):
    return False
  with open(path, 'rb') as f:
    first = f.readline(64 << 20).removeprefix(b'\xef\xbb\xbf')
  try:
    return isinstance(json.loads(first), dict)
  except (ValueError, RecursionError):
    return False


def files(source: str) -> list[str]:
  """Returns the files of a path: itself, or all of a directory, by name."""
  if os.path.isdir(source):
    found = sorted(
      os.path.join(directory, name)
      for directory, _, names in os.walk(source)
      for name in names
      if name.endswith(SUFFIXES)
    )
    if not found:
      raise UserError(f'{source}: no file in it ends in {", ".join(SUFFIXES)}')
    return found
  if not os.path.exists(source):
    raise UserError(
      f'text source {source!r} does not exist; give a file, a directory, '
      'tfds:NAME, or stdlib'
    )
  if not source.endswith(SUFFIXES):
    raise UserError(
      f'{source}: unknown kind of text; it must end in {", ".join(SUFFIXES)}'
    )
  return [source]


def stat(source: str) -> list:
  """Returns what changes when the source does, without reading it."""
  if source == 'stdlib':
    from refrag_jax.data import docstrings, stdlib

    made_by = [_stat_file(m.__file__) for m in (stdlib, docstrings)]
    return ['stdlib', sys.version, *made_by]
  if source.startswith('tfds:'):
    builder, split = _tfds_builder(source)
    root = str(builder.data_path)
    paths = [os.path.join(d, n) for d, _, ns in os.walk(root) for n in ns]
    return [str(split), *(_stat_file(path) for path in sorted(paths))]
  return [_stat_file(path) for path in files(source)]


def _stat_file(path: str) -> list:
  info = os.stat(path)
  return [os.path.abspath(path), info.st_size, info.st_mtime_ns]


class _SkipError(Exception):
  """A record that cannot be used; its argument is the reason."""


def _documents(records, name: str, skipped: Counter) -> Iterator[Document]:
  """Turns (number, function that returns the text) into documents."""
  for number, read in records:
    try:
      text = read()
      if not isinstance(text, str) or not text.strip():
        raise _SkipError(NO_TEXT)
      text.encode('utf-8')  # JSON may spell half of a surrogate pair
    except _SkipError as e:
      skipped[e.args[0]] += 1
    except UnicodeError:
      skipped[NOT_UTF8] += 1
    else:
      yield Document(f'{name}:{number}', text)


def _plain(value):
  """Returns the text of a value that libraries give as bytes."""
  return value.decode('utf-8') if isinstance(value, bytes) else value


def _json(line: bytes):
  """Returns the `text` of a JSON record."""
  try:
    record = json.loads(line.decode('utf-8'))
  except (json.JSONDecodeError, RecursionError) as e:
    raise _SkipError(NOT_JSON) from e
  return record.get('text') if isinstance(record, dict) else None


def _json_or_text(value: bytes):
  """Returns the `text` of a JSON record, or what is not JSON as it stands."""
  if value.lstrip()[:1] == b'{':
    try:
      return _json(value)
    except _SkipError:
      pass
  return _plain(value)


def _txt(path: str, name: str, alone: bool, skipped: Counter):
  with open(path, 'rb') as f:
    data = f.read()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError:
    skipped[NOT_UTF8] += 1
    return
  if not text.strip():
    skipped[NO_TEXT] += 1
    return
  if not alone:
    yield Document(name, text)
    return
  number = min(NUM_SECTIONS, max(1, len(text) // MIN_SECTION))
  begin = 0
  for i in range(1, number + 1):
    aim = max(begin, len(text) * i // number)
    end = len(text)
    if i < number:  # at the next blank line, else line, else right there
      for mark in ('\n\n', '\n'):
        found = text.find(mark, aim, aim + MIN_SECTION)
        if found >= 0:
          end = found + len(mark)
          break
      else:
        end = aim
    if text[begin:end].strip():
      yield Document(f'{name}#{i}', text[begin:end])
    begin = end


def _jsonl(path: str, span: tuple[int, int | None]):
  number = 0
  try:
    for number, line in enumerate(_lines(path, span), 1):
      if number == 1 and not span[0]:
        line = line.removeprefix(b'\xef\xbb\xbf')
      if line.strip():
        yield number, functools.partial(_json, line)
  except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as e:
    raise UserError(
      f'{path}: damaged after line {number} ({e}); fetch or pack it again'
    ) from e


def _lines(path: str, span: tuple[int, int | None]) -> Iterator[bytes]:
  if path.endswith('.gz'):
    with gzip.open(path, 'rb') as f:
      yield from f
  elif path.endswith('.zst'):
    yield from _zst_lines(path)
  else:
    begin, end = span
    with open(path, 'rb') as f:
      if begin:  # the line around it belongs to the span before
        f.seek(begin - 1)
        f.readline()
      while (end is None or f.tell() < end) and (line := f.readline()):
        yield line


def _zst_lines(path: str) -> Iterator[bytes]:
  # Not `stream_reader`: it takes a truncated file for a complete one.
  import zstandard

  rest, frame = b'', None
  with open(path, 'rb') as f:
    while data := f.read(1 << 20):
      while data:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
          rest += frame.decompress(data)
        except zstandard.ZstdError as e:
          raise ValueError(e) from e
        data = b''
        if frame.eof:
          data, frame = frame.unused_data, None
        *lines, rest = rest.split(b'\n')
        yield from lines
  if frame is not None:
    raise EOFError('compressed file ended before its end was reached')
  if rest:
    yield rest


def _parquet(path: str):
  import pyarrow as pa
  import pyarrow.parquet as pq

  number = 0
  try:
    with pq.ParquetFile(path) as f:
      names = f.schema_arrow.names
      if 'text' not in names:
        raise UserError(f'{path}: no column `text`; it has {", ".join(names)}')
      kind = f.schema_arrow.field('text').type
      if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f'{path}: column `text` holds {kind}, not text')
      for batch in f.iter_batches(batch_size=256, columns=['text']):
        # As binary: pyarrow would refuse the batch for one bad string.
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
          yield number, functools.partial(_plain, value)
          number += 1
  except (pa.ArrowException, OSError) as e:
    if isinstance(e, OSError) and e.errno is not None:
      raise  # the disk's fault, not the file's
    reason = str(e).split('\n')[0][:120]
    raise UserError(
      f'{path}: damaged after record {number} ({reason}); fetch it again'
    ) from e


def _array_record(path: str):
  from array_record.python import array_record_module

  number = 0
  try:
    reader = array_record_module.ArrayRecordReader(path)
    try:
      for number in range(reader.num_records()):
        value = reader.read([number])[0]
        yield number, functools.partial(_json_or_text, value)
    finally:
      reader.close()
  except (RuntimeError, ValueError, IndexError) as e:
    reason = str(e).split('\n')[0][:120]
    raise UserError(
      f'{path}: damaged at record {number} ({reason}); write it again'
    ) from e


def _tfds_builder(source: str):
  """Returns a tfds builder and the split's name, without TensorFlow."""
  import tensorflow_datasets as tfds

  name = source.removeprefix('tfds:')
  name, _, split = name.partition(':')
  try:
    if os.path.isdir(name):
      builder = tfds.builder_from_directory(name)
    else:
      # Only ArrayRecord can be written and read without TensorFlow.
      builder = tfds.builder(name, file_format='array_record')
      if not builder.data_path.exists():
        builder.download_and_prepare()
  except Exception as e:  # tfds raises anything, a missing network included
    reason = str(e).strip().split('\n')[0][:200]
    raise UserError(
      f'{source}: tfds cannot give it ({reason}); prepare it with '
      "file_format='array_record' and name its directory, tfds:/DIR:SPLIT"
    ) from e
  splits = list(builder.info.splits)
  split = split or ('train' if 'train' in splits else splits[0])
  return builder, split


def _tfds(source: str):
  builder, split = _tfds_builder(source)
  if 'text' not in builder.info.features:
    raise UserError(
      f'{source}: no feature `text`; it has {", ".join(builder.info.features)}'
    )
  try:
    records = builder.as_data_source(split=split)
  except Exception as e:
    reason = str(e).strip().split('\n')[0][:200]
    raise UserError(
      f'{source}: cannot be read ({reason}); its splits are '
      f'{", ".join(builder.info.splits)}, and without TensorFlow it must have '
      "been prepared with file_format='array_record'"
    ) from e
  for number in range(len(records)):
    yield number, functools.partial(_plain, records[number]['text'])
