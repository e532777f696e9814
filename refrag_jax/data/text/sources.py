"""Documents from whatever the user has: one function, `documents`.

A source is one of

  stdlib                     the running interpreter's own documentation
  PATH.txt                   one document (the only file: cut into sections)
  PATH.jsonl[.gz|.zst]       a record a line, its `text` field; .json likewise
  PATH.parquet               a record a row, its `text` column
  PATH.array_record          a record is JSON with `text`, or the text itself
  DIRECTORY                  every such file below it, by name; links are
                             followed, hidden files and notes left out
  tfds:NAME[/CONFIG][:SPLIT], tfds:/DIRECTORY[:SPLIT]

A record that cannot be used is skipped and counted by its reason; a file that
cannot be read at all ends the run with a sentence that names it.
"""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from refrag_jax.errors import UserError
from refrag_jax.runtime.paths import refuse_pointer

# In a directory; a file that is named itself may also end in .json, which among
# others is mostly what describes them.
SUFFIXES = (
  '.txt',
  '.jsonl',
  '.jsonl.gz',
  '.jsonl.zst',
  '.json.gz',
  '.json.zst',
  '.parquet',
  '.array_record',
  '.arrayrecord',
)
# About the data beside it, not of it.
NOTES = re.compile(
  r'(readme|licen[cs]e|notice|copying|change(s|log)|authors)\b.*\.txt', re.I
)
INVALID = object()
UTF16 = (b'\xff\xfe', b'\xfe\xff')
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


def documents(source: str, skipped: Counter) -> Iterator[Document]:
  """Yields a source's documents, and counts in `skipped` what it left out."""
  if source == 'stdlib':
    from refrag_jax.data.text import stdlib

    yield from (Document(*document) for document in stdlib.documents())
    return
  if source.startswith('tfds:'):
    yield from _documents(_tfds(source), source, skipped)
    return
  paths = files(source)
  skipped.update(left_out(source))
  for path in paths:
    name = (
      os.path.relpath(path, source)
      if path != source
      else (os.path.basename(path))
    )
    yield from read(path, name, len(paths) == 1, skipped)


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
  refuse_pointer(path)
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
  """Returns the files of a path: itself, or all of a directory, by name.

  Raises:
    UserError: there are none, or one of them is a link to nothing or a
      placeholder of Git LFS.
  """
  if os.path.isdir(source):
    found, others = _walk(source)
    if not found:
      beside = f'; it has {described(others)}' if others else ''
      raise UserError(
        f'{source}: no file in it ends in {", ".join(SUFFIXES)}{beside}'
      )
  elif not os.path.lexists(source):
    raise UserError(
      f'text source {source!r} does not exist; give a file, a directory, '
      'tfds:NAME, or stdlib'
    )
  elif not source.endswith((*SUFFIXES, '.json')):
    raise UserError(
      f'{source}: unknown kind of text; it must end in {", ".join(SUFFIXES)}'
    )
  else:
    found = [source]
  for path in found:
    _reachable(path)
    refuse_pointer(path)
  return found


def left_out(source: str) -> Counter:
  """How many files of a directory are not read, by the reason."""
  return _walk(source)[1] if os.path.isdir(source) else Counter()


def described(skipped: Mapping[str, int]) -> str:
  """What was left out, for people to read."""
  return ', '.join(
    f'{n:,} {why}' if why.startswith('files') else f'{n:,} with {why}'
    for why, n in skipped.items()
  )


def _walk(directory: str) -> tuple[list[str], Counter]:
  """The data files below a directory, sorted, and what else is there."""

  def fail(error: OSError):
    raise UserError(
      f'{error.filename} cannot be read ({error.strerror}): mend that, or name '
      'the text that can be read'
    )

  found, notes, unknown, seen = [], [], [], set()
  for place, below, names in os.walk(directory, onerror=fail, followlinks=True):
    info = os.stat(place)
    if (info.st_dev, info.st_ino) in seen:  # a link back, or a second one here
      below.clear()
      continue
    seen.add((info.st_dev, info.st_ino))
    below[:] = sorted(name for name in below if not name.startswith('.'))
    for name in names:
      if name.startswith('.'):
        continue
      kind = found if name.endswith(SUFFIXES) else unknown
      if NOTES.fullmatch(name):
        kind = notes
      kind.append(os.path.join(place, name))
  if not found:  # then they may be the text
    found, notes = notes, []
  left = Counter()
  for kind, what in ((unknown, 'of unknown kind'), (notes, 'about the data')):
    if kind:
      first = os.path.relpath(min(kind), directory)
      left[f'files {what} (first: {first})'] = len(kind)
  return sorted(found), left


def _reachable(path: str) -> None:
  try:
    os.stat(path)
  except OSError as e:
    what = f'cannot be read ({e.strerror})'
    if os.path.islink(path):
      what = f'is a link to {os.readlink(path)}, which {what}'
    raise UserError(f'{path} {what}: mend it, or remove it') from None


def stat(source: str) -> list:
  """Returns what changes when the source does, without reading it."""
  if source == 'stdlib':
    from refrag_jax.data.text import docstrings, stdlib

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
  record = parse(line.decode('utf-8'))
  return record.get('text') if isinstance(record, dict) else None


def parse(line: str):
  """A JSON value, numbers of any length among it.

  Raises:
    _SkipError: it is none.
  """
  try:
    try:
      return json.loads(line)
    except ValueError as e:
      if isinstance(e, json.JSONDecodeError):
        raise
      # A whole number of thousands of digits, which nobody wants as such.
      return json.loads(line, parse_int=float)
  except (json.JSONDecodeError, RecursionError) as e:
    raise _SkipError(NOT_JSON) from e


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
    utf16 = data.startswith(UTF16)
    skipped['UTF-16, not UTF-8 (see iconv)' if utf16 else NOT_UTF8] += 1
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
  for number, line in _numbered(path, span):
    if number == 1 and not span[0] and line.lstrip().startswith(b'['):
      raise UserError(
        f'{path} is one JSON array: give one record a line '
        f'(jq -c .[] {os.path.basename(path)})'
      )
    if line.strip():
      yield number, functools.partial(_json, line)


def _numbered(
  path: str, span: tuple[int, int | None]
) -> Iterator[tuple[int, bytes]]:
  """Yields the lines, unpacked, without a byte order mark."""
  number = 0
  try:
    for number, line in enumerate(_lines(path, span), 1):
      if number == 1 and not span[0]:
        line = line.removeprefix(b'\xef\xbb\xbf')
        if line.startswith(UTF16):
          raise UserError(f'{path} is UTF-16, not UTF-8: convert it with iconv')
      yield number, line
  except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as e:
    raise UserError(
      f'{path}: damaged after line {number} ({e}); fetch or pack it again'
    ) from e


def json_values(path: str) -> Iterator[tuple[int, Any]]:
  """Yields (line, value) of a file with a JSON value a line, packed or not.

  A file that is one array is read as well, its values numbered from 1. What is
  no JSON comes as INVALID.

  Raises:
    UserError: the file is damaged.
  """
  # Lines of some files come with their ends, of others without.
  lines = (line.rstrip(b'\r\n') for _, line in _numbered(path, (0, None)))
  blank, first = 0, next(lines, None)
  while first is not None and not first.strip():
    blank, first = blank + 1, next(lines, None)
  rest = itertools.chain([first or b''], lines)
  if first and first.lstrip().startswith(b'['):
    whole = b'\n'.join(rest)
    try:
      values = parse(whole.decode('utf-8'))
    except (UnicodeError, _SkipError):
      values = None
    # Else it is a list a line, of which no record is made.
    if isinstance(values, list):
      yield from enumerate(values, 1)
      return
    rest = whole.split(b'\n')
  for number, line in enumerate(rest, blank + 1):
    if line.strip():
      try:
        yield number, parse(line.decode('utf-8'))
      except (UnicodeError, _SkipError):
        yield number, INVALID


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

  # Of any window: those of --long are larger than what it takes by itself.
  unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
  rest, frame = b'', None
  with open(path, 'rb') as f:
    while data := f.read(1 << 20):
      while data:
        frame = frame or unpacker.decompressobj()
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
      coded = pa.types.is_dictionary(kind)
      if not _is_text(kind.value_type if coded else kind):
        raise UserError(f'{path}: column `text` holds {kind}, not text')
      for batch in f.iter_batches(batch_size=256, columns=['text']):
        column = batch.column(0)
        column = column.dictionary_decode() if coded else column
        # As binary: pyarrow would refuse the batch for one bad string.
        for value in column.cast(pa.large_binary()).to_pylist():
          yield number, functools.partial(_plain, value)
          number += 1
  except (pa.ArrowException, OSError) as e:
    if isinstance(e, OSError) and e.errno is not None:
      raise  # the disk's fault, not the file's
    reason = str(e).split('\n')[0][:120]
    raise UserError(
      f'{path}: damaged after record {number} ({reason}); fetch it again'
    ) from e


def _is_text(kind) -> bool:
  """Whether an Arrow type holds strings, or bytes that may be such."""
  import pyarrow as pa

  kinds = ('string', 'large_string', 'string_view', 'binary', 'large_binary',
           'binary_view')  # fmt: skip
  return any(getattr(pa.types, f'is_{name}')(kind) for name in kinds)


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

  name, split = source.removeprefix('tfds:'), ''
  if not os.path.isdir(name):  # a directory's name may have a colon
    name, _, split = name.rpartition(':') if ':' in name else (name, '', '')
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
