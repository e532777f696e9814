"""Building a token index (corpus.py) in a directory: copy, split, tokenise.

Sources are read once, into a spool file; the split and the lines that its
sides share are found there, then every document is cleaned, tokenised and
appended to the arrays. Memory holds a few numbers a document and the held-out
lines, never the text.
"""

import hashlib
import itertools
import json
import os
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from refrag_jax.data import text as text_lib
from refrag_jax.errors import UserError
from refrag_jax.progress import passing

# A line of at least so many characters, white space aside, that stands on both
# sides of the split is dropped from both: shorter ones ("Returns:") carry no
# content, and a document that lost every "else:" is no text any more.
SHARED_LINE = 20
BATCH = 64  # documents tokenised at once
SHARED = 'nothing but lines of the other side'
ZERO_TOKENS = 'zero tokens'


def write_json(path: str, value: Any) -> None:
  """Writes a file that is there whole or not at all."""
  temporary = f'{path}.{uuid.uuid4().hex}'
  try:
    with open(temporary, 'w', encoding='utf-8') as f:
      json.dump(value, f, indent=1)
    os.replace(temporary, path)
  except BaseException:
    if os.path.exists(temporary):
      os.unlink(temporary)
    raise


def spool(sources: Sequence[str], directory: str) -> dict[str, Any]:
  """Copies all documents into one file, so that sources are read once."""
  offsets, source_of, hashes, skipped = [0], [], [], []
  total = hashlib.sha256()
  with open(os.path.join(directory, 'spool'), 'wb') as f:
    for number, source in enumerate(sources):
      skipped.append(Counter())
      documents = text_lib.documents(source, skipped[-1])
      texts = (document.text.encode('utf-8') for document in documents)
      for data in passing(texts, f'reading {source}'):
        f.write(data)
        total.update(hashlib.sha256(data).digest() + struct.pack('<q', number))
        offsets.append(offsets[-1] + len(data))
        source_of.append(number)
        hashes.append(_hash(data))
  return {
    'hash': total.hexdigest(),
    'offsets': np.asarray(offsets, np.int64),
    'source': np.asarray(source_of, np.int32),
    'hashes': np.asarray(hashes, np.uint64),
    'skipped': skipped,
  }


def is_heldout(text: str, fraction: float) -> bool:
  """Returns the side on which a hash puts a document with this text."""
  return _hash(text.encode('utf-8')) < fraction * 2**64


def _hash(data: bytes) -> int:
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def _split(content: dict[str, Any], fraction: float) -> np.ndarray:
  """Returns which documents are held out.

  By a hash of the text, so that a document stays on its side when others come
  or go. Where chance leaves a source of two or more documents nothing on one
  side, the document whose hash is nearest to that side goes there; a lone one
  is trained on.
  """
  hashes = content['hashes']
  heldout = np.asarray([int(h) < fraction * 2**64 for h in hashes], bool)
  if 0 < fraction < 1:
    for source in np.unique(content['source']):
      members = np.flatnonzero(content['source'] == source)
      if len(members) == 1:
        heldout[members] = False
      elif not heldout[members].any():
        heldout[members[np.argmin(hashes[members])]] = True
      elif heldout[members].all():
        heldout[members[np.argmax(hashes[members])]] = False
  return heldout


def _lines(data: bytes) -> Iterator[tuple[bytes, bytes | None]]:
  """Yields each line, whole, and its key if it is long enough to compare."""
  for line in data.splitlines(keepends=True):
    key = b' '.join(line.split())
    yield line, key if len(key) - key.count(b' ') >= SHARED_LINE else None


def _shared_lines(
  read: Callable[[int], bytes], heldout: np.ndarray
) -> set[bytes]:
  """Returns the keys of the long lines that stand on both sides."""
  held, shared = set(), set()
  heldout_texts = map(read, np.flatnonzero(heldout))
  for data in passing(heldout_texts, 'reading held-out lines'):
    held.update(key for _, key in _lines(data) if key)
  rest = np.flatnonzero(~heldout) if held else ()
  for data in passing(map(read, rest), 'comparing lines'):
    shared.update(key for _, key in _lines(data) if key in held)
  return shared


def build(directory, content, sources, tokenizer, fraction) -> None:
  """Writes the index of the spooled documents into their directory.

  Args:
    content: what `spool` returned for this directory.
  """
  skipped, source = content['skipped'], content['source']
  if not len(source):
    raise UserError(_nothing(sources, skipped, 'document'))
  path = os.path.join(directory, 'spool')
  data = np.memmap(path, np.uint8, 'r')

  def read(d: int) -> bytes:
    return data[content['offsets'][d] : content['offsets'][d + 1]].tobytes()

  heldout = _split(content, fraction)
  shared = _shared_lines(read, heldout)
  dropped = [0] * len(sources)

  def cleaned() -> Iterator[tuple[int, bytes]]:
    documents = map(read, range(len(source)))
    whole = content['offsets'][-1]
    for d, data in enumerate(passing(documents, 'tokenising', whole)):
      lines = list(_lines(data)) if shared else [(data, None)]
      rest = [line for line, key in lines if key not in shared]
      dropped[source[d]] += len(lines) - len(rest)
      text = b''.join(rest)
      if text.strip():
        yield d, text
      else:
        skipped[source[d]][SHARED] += 1

  kept, token_offsets, text_offsets = [], [0], [0]
  total = hashlib.sha256(tokenizer.fingerprint.encode())
  small = tokenizer.vocab_size <= 1 << 16
  with (
    _Column(directory, 'tokens', np.uint16 if small else np.int32) as tokens,
    _Column(directory, 'starts', np.int32) as starts,
    _Column(directory, 'text', np.uint8) as texts,
  ):
    documents = cleaned()
    # In batches, because tokenizers encode those in several threads.
    while batch := list(itertools.islice(documents, BATCH)):
      encoded = tokenizer.encode_batch([t.decode('utf-8') for _, t in batch])
      for (d, text), (ids, chars) in zip(batch, encoded, strict=True):
        if not len(ids):
          skipped[source[d]][ZERO_TOKENS] += 1
          continue
        total.update(hashlib.sha256(text).digest() + heldout[d].tobytes())
        tokens.append(ids)
        starts.append(_bytes_of(chars, text))
        texts.append(np.frombuffer(text, np.uint8))
        token_offsets.append(tokens.length)
        text_offsets.append(texts.length)
        kept.append(d)
  os.unlink(path)

  columns = {
    'token_offsets': np.asarray(token_offsets, np.int64),
    'text_offsets': np.asarray(text_offsets, np.int64),
    'source': source[kept],
    'heldout': heldout[kept],
  }
  counts = _count(columns, skipped, dropped)
  _check(sources, counts, skipped, fraction)
  for name, values in columns.items():
    np.save(os.path.join(directory, f'{name}.npy'), values)
  meta = {
    'hash': total.hexdigest(),
    'tokenizer': tokenizer.fingerprint,
    'heldout_fraction': fraction,
    'sources': counts,
  }
  write_json(os.path.join(directory, 'meta.json'), meta)


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
  left_out = ', '.join(f'{n} with {why}' for why, n in reasons.items())
  return (
    f'{", ".join(sources)}: not one {what} with text'
    f' ({"left out: " + left_out if left_out else "it is empty"}); '
    'give data.text sources with more text'
  )


def _bytes_of(chars_N: np.ndarray, data: bytes) -> np.ndarray:
  """Turns character positions of a text into positions of its UTF-8."""
  if data.isascii():
    return chars_N
  data_N = np.frombuffer(data, np.uint8)
  begins = np.flatnonzero((data_N & 0xC0) != 0x80)
  return np.append(begins, len(data)).astype(np.int32)[chars_N]


class _Column:
  """A one-dimensional .npy file that is written by appending."""

  def __init__(self, directory: str, name: str, dtype):
    self.dtype, self.length = np.dtype(dtype), 0
    path = os.path.join(directory, f'{name}.npy')
    self._file = open(path, 'wb')  # noqa: SIM115
    self._header()

  def _header(self):
    # numpy pads the header so that the length can grow in place.
    np.lib.format.write_array_header_1_0(
      self._file,
      {
        'descr': np.lib.format.dtype_to_descr(self.dtype),
        'fortran_order': False,
        'shape': (self.length,),
      },
    )

  def append(self, values: np.ndarray) -> None:
    self._file.write(values.astype(self.dtype).tobytes())
    self.length += len(values)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    with self._file:
      self._file.seek(0)
      self._header()
