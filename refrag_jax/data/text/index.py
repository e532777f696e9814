"""From text to the arrays of a token index (corpus.py), shard by shard.

A `Job` says what is to be prepared. Its stages follow each other:

  reading     the sources, cut into units of a few MB: documents with their
              hashes and those of their lines, in shards of SHARD_BYTES
  splitting   which documents are held out, and the lines that those have
  comparing   which of these lines a shard has in training
  sharing     all of them: the lines that stand on both sides
  tokenising  a shard without those lines
  joining     one array of all shards
  closing     the small arrays and meta.json; the index gets its name

Each unit of a stage is a function of the files of the stages before it and
makes one file, which appears whole. So it does not matter who works on which
unit (workers.py), how many do, or how often they are killed: what is there is
not done again, and the index is the same byte for byte. How text is cut into
units and shards depends on the text alone.

Nothing here imports JAX, so that a worker starts quickly.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from refrag_jax.data.text import sources as text_lib
from refrag_jax.data.tokenizers import Tokenizer
from refrag_jax.errors import UserError
from refrag_jax.runtime import files as files_lib

FORMAT = 1
ARRAYS = (
  'tokens', 'starts', 'text', 'token_offsets', 'text_offsets', 'source',
  'heldout',
)  # fmt: skip
LARGE = ARRAYS[:3]  # a value a token or byte, the others one a document
# A line of at least so many characters, white space aside, that stands on both
# sides of the split is dropped from both: shorter ones ("Returns:") carry no
# content, and a document that lost every "else:" is no text any more.
SHARED_LINE = 20
BATCH = 64  # documents tokenised at once
# What a kill can undo, and what workers wait for at the end of a stage.
SHARD_BYTES = 4 << 20
SHARED = 'nothing but lines of the other side'
ZERO_TOKENS = 'zero tokens'


@dataclasses.dataclass(frozen=True)
class Job:
  """What to prepare; plain values, so that it can be sent to a worker."""

  sources: list[str]
  units: list[list]  # as `_units` gives them
  size: int  # bytes of the files, as they lie there
  shard_bytes: int
  tokenizer: str
  fingerprint: str
  vocab_size: int
  fraction: float
  cache_dir: str
  settings: list  # with a hash of the text: the name of the index
  pointer: str  # the file that leads from the sources to the index
  directory: str  # of the shards

  def path(self, *names: str) -> str:
    return os.path.join(self.directory, *names)

  @property
  def compares(self) -> bool:
    """Whether there may be lines on both sides."""
    return 0 < self.fraction < 1


def job(
  sources: Sequence[str],
  tokenizer: Tokenizer,
  cache_dir: str,
  fraction: float,
) -> Job:
  """Looks at the sources without reading them."""
  settings = [FORMAT, SHARED_LINE, tokenizer.fingerprint, fraction]
  stats = [text_lib.stat(source) for source in sources]
  units = [
    [number, *unit]
    for number, source in enumerate(sources)
    for unit in _units(source)
  ]
  name = digest([settings, stats])
  cut = digest([settings, stats, units, SHARD_BYTES])
  files = itertools.chain.from_iterable(stats)
  return Job(
    sources=list(sources),
    units=units,
    size=sum(entry[1] for entry in files if isinstance(entry, list)),
    shard_bytes=SHARD_BYTES,
    tokenizer=tokenizer.name,
    fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size,
    fraction=fraction,
    cache_dir=cache_dir,
    settings=settings,
    pointer=os.path.join(cache_dir, f'{name}.json'),
    directory=os.path.join(cache_dir, f'.building-{cut}'),
  )


def digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def _units(source: str) -> Iterator[list]:
  """Yields what one worker reads of a source at a time.

  Either [None, False], all of it, or [spans, alone]: spans are (path, begin,
  end), and `alone` is whether the source is a single file. Small files come
  together and large ones in spans, where their kind can be cut.
  """
  if _is_whole(source):
    yield [None, False]
    return
  paths = text_lib.files(source)
  alone = len(paths) == 1
  spans, size = [], 0
  for path in paths:
    length = os.path.getsize(path)
    if spans and size + length > SHARD_BYTES:
      yield [spans, alone]
      spans, size = [], 0
    if length > SHARD_BYTES and text_lib.has_spans(path):
      for begin in range(0, length, SHARD_BYTES):
        end = min(begin + SHARD_BYTES, length)
        yield [[[path, begin, end]], alone]
    else:
      spans.append([path, 0, None])
      size += length
  if spans:
    yield [spans, alone]


def _is_whole(source: str) -> bool:
  """Whether a source is no files of its own, and read by one worker."""
  return source == 'stdlib' or source.startswith('tfds:')


def load(directory: str) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns meta.json and the arrays, or None if they are not all there."""
  try:
    with open(os.path.join(directory, 'meta.json'), encoding='utf-8') as f:
      meta = json.load(f)
    if not (isinstance(meta, dict) and {'hash', 'sources'} <= meta.keys()):
      return None
    arrays = {
      name: np.load(os.path.join(directory, f'{name}.npy'), mmap_mode='r')
      for name in ARRAYS
    }
  # ValueError: no JSON, or shorter than its header says; EOFError: empty.
  except (OSError, ValueError, EOFError):
    return None
  return meta, arrays


def follow(pointer: str) -> str | None:
  """Returns the directory of the index that a pointer leads to, if it does."""
  try:
    with open(pointer, encoding='utf-8') as f:
      directory = os.path.join(os.path.dirname(pointer), json.load(f)['index'])
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return directory if load(directory) else None


class Stage(NamedTuple):
  name: str
  units: Callable[[Job], list[str]]
  file: str  # in the job's directory; {} is the unit
  run: Callable[[Job, str, Callable[[], Tokenizer]], None]

  def is_done(self, job: Job, unit: str) -> bool:
    return os.path.exists(job.path(self.file.format(unit)))

  def left(self, job: Job) -> list[str]:
    """The units that are to do, by one look at the directory."""
    folder, file = os.path.split(self.file)
    there = set(os.listdir(job.path(folder)))
    return [u for u in self.units(job) if file.format(u) not in there]


def open_directory(job: Job) -> None:
  for stage in STAGES:
    folder = job.path(os.path.dirname(stage.file))
    os.makedirs(folder, exist_ok=True)


class DamagedError(Exception):
  """A shard was, and is not any more: its unit is to be worked on again."""


def _save(job: Job, folder: str, name: str, **arrays: Any) -> None:
  """Writes arrays into one file with a checksum of each.

  Not synced, for that costs more than a small shard: what a power cut leaves
  of one is found by `_load`.
  """
  with files_lib.writing(job.path(folder, f'{name}.npz'), sync=False) as f:
    np.savez(f, **arrays)


def _load(job: Job, folder: str, name: str, *arrays: str) -> list[np.ndarray]:
  path = job.path(folder, f'{name}.npz')
  try:
    with open(path, 'rb') as file, np.load(file) as f:
      return [f[array] for array in arrays]
  except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as e:
    # And what tells that all parts of a unit, or of the split, are there.
    for file in (f'{name}.npz', f'{name.split("-")[0]}.npz', 'split.json'):
      with contextlib.suppress(FileNotFoundError):
        os.unlink(job.path(folder, file))
    raise DamagedError(name) from e


# -- reading ------------------------------------------------------------------


def _read(job: Job, unit: str, _) -> None:
  """Writes the documents of a unit in shards, and how many shards they are.

  A shard that is there stays: of a source that cannot be cut a restart reads
  the beginning again, but does no more with it.
  """
  number, spans, alone = job.units[int(unit)]
  skipped = Counter()
  if spans is None:
    documents = text_lib.documents(job.sources[number], skipped)
  else:
    documents = itertools.chain.from_iterable(
      text_lib.read(path, path, alone, skipped, (begin, end))
      for path, begin, end in spans
    )
  parts = 0
  texts = (document.text.encode('utf-8') for document in documents)
  for shard in _cut(texts, job.shard_bytes):
    name = f'{unit}-{parts:06}'
    if not os.path.exists(job.path('read', f'{name}.npz')):
      _save(job, 'read', name, **_hashed(shard, job.compares))
    parts += 1
  reasons, counts = list(skipped), list(skipped.values())
  _save(job, 'read', unit, parts=parts, reasons=reasons, counts=counts)


def _cut(texts: Iterator[bytes], most: int) -> Iterator[list[bytes]]:
  shard, size = [], 0
  for text in texts:
    if shard and size + len(text) > most:
      yield shard
      shard, size = [], 0
    shard.append(text)
    size += len(text)
  if shard:
    yield shard


def _hashed(texts: list[bytes], compares: bool) -> dict[str, np.ndarray]:
  """The texts one after the other, and what is asked of them later."""
  lines = [_line_hashes(text) if compares else [] for text in texts]
  return {
    'text': np.frombuffer(b''.join(texts), np.uint8),
    'lengths': np.asarray([len(text) for text in texts], np.int64),
    'hashes': np.asarray([_hash(text) for text in texts], np.uint64),
    'digests': _digests(texts),
    'lines': np.asarray(list(itertools.chain(*lines)), np.uint64),
    'line_counts': np.asarray([len(of) for of in lines], np.int64),
  }


def _digests(texts: list[bytes]) -> np.ndarray:
  data = b''.join(hashlib.sha256(text).digest() for text in texts)
  return np.frombuffer(data, np.uint8).reshape(-1, 32)


def _line_hashes(text: bytes) -> list[int]:
  """A hash of each line without its outer white space; 0 of a short one."""
  return [
    _hash(key) or 1 if len(key) - key.count(b' ') >= SHARED_LINE else 0
    for key in (b' '.join(line.split()) for line in text.splitlines())
  ]


def is_heldout(text: str, fraction: float) -> bool:
  """Returns the side on which a hash puts a document with this text."""
  return _hash(text.encode('utf-8')) < fraction * 2**64


def _hash(data: bytes) -> int:
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, 'little')


# -- splitting ----------------------------------------------------------------


def _split(job: Job, unit: str, _) -> None:
  """Decides what needs all documents: sides, names and order of the shards."""
  del unit
  shards, skipped = [], [text_lib.left_out(source) for source in job.sources]
  total, first, hashes = hashlib.sha256(), 0, []
  for u, (number, *_) in enumerate(job.units):
    parts, *left = _load(job, 'read', f'{u:06}', 'parts', 'reasons', 'counts')
    for reason, count in zip(*(values.tolist() for values in left)):
      skipped[number][reason] += count
    for part in range(parts):
      name = f'{u:06}-{part:06}'
      of_shard, digests = _load(job, 'read', name, 'hashes', 'digests')
      hashes.append(of_shard)
      for of_one in digests:
        total.update(of_one.tobytes() + struct.pack('<q', number))
      shards.append([name, number, first, len(hashes[-1])])
      first += len(hashes[-1])
  if not shards:
    raise UserError(_nothing(job.sources, skipped, 'document'))
  source = np.repeat(
    np.asarray([number for _, number, _, _ in shards], np.int32),
    [count for _, _, _, count in shards],
  )
  heldout = sides(source, np.concatenate(hashes), job.fraction)
  held = [_lines_of(job, shard, heldout) for shard in shards if job.compares]
  held = np.unique(np.concatenate([np.zeros(0, np.uint64), *held]))
  _save(job, 'split', 'heldout', sides=heldout)
  # No worker has memory for all of them: synced, because not read in whole.
  with files_lib.writing(job.path('split', 'lines.npy')) as f:
    np.save(f, held)
  files_lib.write_json(
    job.path('split', 'split.json'),
    {
      'index': digest([job.settings, total.hexdigest()]),
      'shards': shards,
      'skipped': skipped,
    },
  )


def sides(
  source: np.ndarray, hashes: np.ndarray, fraction: float
) -> np.ndarray:
  """Which documents are held out, bool (N,); `hashes` are uint64 (N,).

  By a hash of the text, so that a document stays on its side when others come
  or go. Where chance leaves a source of two or more documents nothing on one
  side, the document whose hash is nearest to that side goes there; a lone one
  is trained on.
  """
  bound = math.ceil(fraction * 2**64)
  if bound == 2**64:
    heldout = np.ones(len(hashes), bool)
  else:
    heldout = hashes < np.uint64(bound)
  if 0 < fraction < 1:
    for number in np.unique(source):
      members = np.flatnonzero(source == number)
      if len(members) == 1:
        heldout[members] = False
      elif not heldout[members].any():
        heldout[members[np.argmin(hashes[members])]] = True
      elif heldout[members].all():
        heldout[members[np.argmax(hashes[members])]] = False
  return heldout


def _lines_of(job: Job, shard: list, side: np.ndarray) -> np.ndarray:
  """Hashes of the long lines of a shard's documents on one side."""
  name, _, first, count = shard
  of_documents = side[first : first + count]
  if not of_documents.any():
    return np.zeros(0, np.uint64)
  lines, counts = _load(job, 'read', name, 'lines', 'line_counts')
  lines = lines[np.repeat(of_documents, counts)]
  return np.unique(lines[lines > 0])


def _split_of(job: Job) -> dict[str, Any]:
  return files_lib.read_json(job.path('split', 'split.json'))


def _target(job: Job) -> str:
  """The directory of the index; its name is a hash of text and settings."""
  return os.path.join(job.cache_dir, _split_of(job)['index'])


def _shards(job: Job) -> list[str]:
  """All shards, or none where such text was prepared under another name."""
  if load(_target(job)):
    return []
  return [name for name, *_ in _split_of(job)['shards']]


# -- lines on both sides ------------------------------------------------------


def _among(values: np.ndarray, of_sorted: np.ndarray) -> np.ndarray:
  """Which of the values are among others, without reading all of those."""
  if not len(of_sorted):
    return np.zeros(len(values), bool)
  at = np.searchsorted(of_sorted, values)
  return of_sorted[np.minimum(at, len(of_sorted) - 1)] == values


def _compare(job: Job, unit: str, _) -> None:
  (shard,) = (s for s in _split_of(job)['shards'] if s[0] == unit)
  (heldout,) = _load(job, 'split', 'heldout', 'sides')
  lines = _lines_of(job, shard, ~heldout)
  held = np.load(job.path('split', 'lines.npy'), mmap_mode='r')
  _save(job, 'compared', unit, lines=lines[_among(lines, held)])


def _share(job: Job, unit: str, _) -> None:
  found = [_load(job, 'compared', s, 'lines')[0] for s in _shards(job)]
  _save(job, 'shared', unit, lines=np.unique(np.concatenate(found)))


# -- tokenising ---------------------------------------------------------------


def _tokenise(job: Job, unit: str, tokenizer: Callable[[], Tokenizer]) -> None:
  text, lengths, lines, counts = _load(
    job, 'read', unit, 'text', 'lengths', 'lines', 'line_counts'
  )
  drops = np.zeros(len(lines), bool)
  if job.compares:
    drops = _among(lines, *_load(job, 'shared', 'lines', 'lines'))
  made = tokenised(_pieces(text, lengths), _pieces(drops, counts), tokenizer())
  _save(job, 'tokens', unit, **made)


def _pieces(values: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
  return iter(np.split(values, np.cumsum(lengths)[:-1]))


def tokenised(
  texts: Iterator[np.ndarray],
  drops: Iterator[np.ndarray],
  tokenizer: Tokenizer,
) -> dict[str, Any]:
  """Cleans and encodes documents.

  Args:
    texts: their UTF-8.
    drops: which lines of each are to be dropped.
  """
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
  dropped, skipped = 0, Counter()
  cleaned = []
  for d, (text, drop) in enumerate(zip(texts, drops, strict=True)):
    text = text.tobytes()
    if drop.any():
      lines = zip(text.splitlines(keepends=True), drop, strict=True)
      text = b''.join(line for line, dropping in lines if not dropping)
      dropped += int(drop.sum())
    if text.strip():
      cleaned.append((d, text))
    else:
      skipped[SHARED] += 1
  kept, tokens, starts = [], [], []
  for at in range(0, len(cleaned), BATCH):
    # In batches, because tokenizers encode those in several threads.
    batch = cleaned[at : at + BATCH]
    encoded = tokenizer.encode_batch([t.decode('utf-8') for _, t in batch])
    for (d, text), (ids, chars) in zip(batch, encoded, strict=True):
      if not len(ids):
        skipped[ZERO_TOKENS] += 1
        continue
      kept.append((d, text))
      tokens.append(ids.astype(dtype))
      starts.append(_bytes_of(chars, text).astype(np.int32))
  return {
    'tokens': np.concatenate([np.zeros(0, dtype), *tokens]),
    'starts': np.concatenate([np.zeros(0, np.int32), *starts]),
    'text': np.frombuffer(b''.join(text for _, text in kept), np.uint8),
    'token_lengths': np.asarray([len(ids) for ids in tokens], np.int64),
    'text_lengths': np.asarray([len(text) for _, text in kept], np.int64),
    'kept': np.asarray([d for d, _ in kept], np.int64),
    'digests': _digests([text for _, text in kept]),
    'dropped': dropped,
    'skipped': [skipped[why] for why in (SHARED, ZERO_TOKENS)],
  }


def _bytes_of(chars_N: np.ndarray, data: bytes) -> np.ndarray:
  """Turns character positions of a text into positions of its UTF-8."""
  if data.isascii():
    return chars_N
  data_N = np.frombuffer(data, np.uint8)
  begins = np.flatnonzero((data_N & 0xC0) != 0x80)
  return np.append(begins, len(data)).astype(np.int32)[chars_N]


# -- joining and closing ------------------------------------------------------


def _tokenised(job: Job, *names: str) -> Iterator[list[np.ndarray]]:
  """Yields these arrays of each shard, in order."""
  for unit in _shards(job):
    yield _load(job, 'tokens', unit, *names)


def _join(job: Job, unit: str, _) -> None:
  with files_lib.writing(job.path('index', f'{unit}.npy')) as f:
    length = 0
    for (values,) in _tokenised(job, unit):
      if not length:
        _header(f, values.dtype, 0)
      f.write(values)
      length += len(values)
    f.seek(0)
    _header(f, values.dtype, length)


def _header(f, dtype: np.dtype, length: int) -> None:
  # numpy pads the header so that the length can grow in place.
  np.lib.format.write_array_header_1_0(
    f,
    {
      'descr': np.lib.format.dtype_to_descr(dtype),
      'fortran_order': False,
      'shape': (length,),
    },
  )


def _close(job: Job, unit: str, _) -> None:
  """Writes what is small; then the index gets its name, and is pointed to."""
  del unit
  target = _target(job)
  if load(target) is None:
    _write_rest(job)
    files_lib.sync_directory(job.path('index'))
    shutil.rmtree(target, ignore_errors=True)  # damaged, if there
    # Another process may have been quicker: then theirs is as good.
    try:
      os.rename(job.path('index'), target)
    except OSError as e:
      if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
        raise
    files_lib.sync_directory(job.cache_dir)
  files_lib.write_json(
    job.pointer,
    {'index': os.path.basename(target), 'sources': job.sources},
  )


def _write_rest(job: Job) -> None:
  split = _split_of(job)
  (heldout,) = _load(job, 'split', 'heldout', 'sides')
  skipped = [Counter(of_one) for of_one in split['skipped']]
  dropped = [0] * len(skipped)
  total = hashlib.sha256(job.fingerprint.encode())
  kept, sources, token_lengths, text_lengths = [], [], [], []
  names = (
    'kept', 'token_lengths', 'text_lengths', 'digests', 'dropped', 'skipped'
  )  # fmt: skip
  for (_, source, first, _), values in zip(
    split['shards'], _tokenised(job, *names), strict=True
  ):
    of_shard, tokens, text, digests, lines, reasons = values
    kept.append(first + of_shard)
    sources.append(np.full(len(of_shard), source, np.int32))
    token_lengths.append(tokens)
    text_lengths.append(text)
    dropped[source] += int(lines)
    for why, number in zip((SHARED, ZERO_TOKENS), reasons.tolist()):
      if number:
        skipped[source][why] += number
    for d, of_one in zip(kept[-1], digests):
      total.update(of_one.tobytes() + heldout[d].tobytes())
  columns = {
    'token_offsets': _offsets(token_lengths),
    'text_offsets': _offsets(text_lengths),
    'source': np.concatenate(sources),
    'heldout': heldout[np.concatenate(kept)],
  }
  counts = _count(columns, skipped, dropped)
  _check(job.sources, counts, skipped, job.fraction)
  for name, values in columns.items():
    with files_lib.writing(job.path('index', f'{name}.npy')) as f:
      np.save(f, values)
  meta = {
    'hash': total.hexdigest(),
    'tokenizer': job.fingerprint,
    'heldout_fraction': job.fraction,
    'sources': counts,
  }
  files_lib.write_json(job.path('index', 'meta.json'), meta)


def _offsets(lengths: list[np.ndarray]) -> np.ndarray:
  return np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)


def _count(columns, skipped, dropped) -> list[dict[str, Any]]:
  """Returns the numbers of each source, for `Corpus.summary`."""
  counts = []
  lengths = np.diff(columns['token_offsets'])
  for number in range(len(skipped)):
    count = {'skipped': dict(skipped[number]), 'shared_lines': dropped[number]}
    for name, side in (('train', False), ('heldout', True)):
      mine = (columns['source'] == number) & (columns['heldout'] == side)
      count[f'{name}_documents'] = int(mine.sum())
      count[f'{name}_tokens'] = int(lengths[mine].sum())
    counts.append(count)
  return counts


def _check(sources, counts, skipped, fraction) -> None:
  """Refuses a corpus that cannot serve what it was prepared for."""
  if fraction < 1:
    for number, count in enumerate(counts):
      if not count['train_documents']:
        raise UserError(
          _nothing(
            sources[number : number + 1],
            skipped[number : number + 1],
            'training document',
          )
        )
  if fraction > 0 and not any(c['heldout_documents'] for c in counts):
    raise UserError(
      _nothing(sources, skipped, 'held-out document')
      + ' (a split by document needs two of them)'
    )


def _nothing(sources, skipped, what: str) -> str:
  reasons = sum(skipped, Counter())
  left_out = text_lib.described(reasons)
  return (
    f'{", ".join(sources)}: not one {what} with text'
    f' ({"left out: " + left_out if left_out else "it is empty"}); '
    'give data.text sources with more text'
  )


STAGES = (
  Stage(
    'reading',
    lambda job: [f'{n:06}' for n in range(len(job.units))],
    'read/{}.npz',
    _read,
  ),
  Stage('splitting', lambda job: ['split'], 'split/{}.json', _split),
  Stage(
    'comparing',
    lambda job: _shards(job) if job.compares else [],
    'compared/{}.npz',
    _compare,
  ),
  Stage(
    'sharing',
    lambda job: ['lines'] if job.compares and _shards(job) else [],
    'shared/{}.npz',
    _share,
  ),
  Stage('tokenising', _shards, 'tokens/{}.npz', _tokenise),
  Stage(
    'joining',
    lambda job: list(LARGE) if _shards(job) else [],
    'index/{}.npy',
    _join,
  ),
  # Done when the pointer leads to the index, whatever other files there are.
  Stage(
    'closing',
    lambda job: [] if follow(job.pointer) else ['index'],
    'closed/{}',
    _close,
  ),
)


def stands_at(job: Job) -> tuple[str, int, int, int]:
  """Returns the stage that is under way, and how far it is.

  Its units that are done, of how many, and its files: one unit may be a file
  that is read for hours.
  """
  units, left, files = [], 0, 0
  for stage in STAGES:
    try:
      units = stage.units(job)
      left = len(stage.left(job))
      files = len(os.listdir(job.path(os.path.dirname(stage.file))))
    except OSError:  # all is done by now
      break
    if left:
      break
  return stage.name, len(units) - left, len(units), files
