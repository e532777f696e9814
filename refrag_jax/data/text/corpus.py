"""The token index: text, tokenised once, split, and cached by its content.

An index is a directory of flat arrays that are read as memory maps:

  tokens.npy        uint16 or int32[N]   all documents' tokens in turn
  starts.npy        int32[N]             byte of its document's text where the
                                         token's span begins (tokenizers.py)
  text.npy          uint8[bytes]         the documents as UTF-8
  token_offsets.npy int64[D + 1]         document d has tokens [d] to [d + 1]
  text_offsets.npy  int64[D + 1]
  source.npy        int32[D]             number of the document's source
  heldout.npy       bool[D]              which side of the split it is on
  meta.json         counts, hashes, what was left out and why

It is built in a directory of its own (index.py), by as many processes as there
are cores and hosts (pool.py), and renamed when it is complete. Its name is a
hash of the text, the tokenizer and the settings; a small file beside it
remembers which sizes and times of the user's files led to it, so that a second
start reads no text.
"""

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from refrag_jax.data.text import index, pool
from refrag_jax.data.text import sources as text_lib
from refrag_jax.data.tokenizers import Tokenizer
from refrag_jax.errors import UserError

is_heldout = index.is_heldout


@dataclasses.dataclass(frozen=True)
class Corpus:
  directory: str
  hash: str  # of the kept text, its sides and the tokenizer
  sources: tuple[str, ...]
  weights: tuple[float, ...]
  meta: dict[str, Any]
  tokens: np.ndarray
  starts: np.ndarray
  text: np.ndarray
  token_offsets: np.ndarray
  text_offsets: np.ndarray
  source: np.ndarray
  heldout: np.ndarray

  def documents(self, split: str, source: int | None = None) -> np.ndarray:
    """Returns the numbers of a side's documents, of one source or of all."""
    side = self.heldout if split == 'heldout' else ~self.heldout
    if source is not None:
      side = side & (self.source == source)
    return np.flatnonzero(side)

  def part(self, source: int) -> 'Corpus':
    """Returns the corpus of one source alone; its documents count from 0."""
    first, last = np.searchsorted(self.source, (source, source + 1))
    return dataclasses.replace(
      self,
      sources=self.sources[source : source + 1],
      weights=(1.0,),
      meta=self.meta | {'sources': [self.meta['sources'][source]]},
      token_offsets=self.token_offsets[first : last + 1],
      text_offsets=self.text_offsets[first : last + 1],
      source=np.zeros(last - first, np.int32),
      heldout=self.heldout[first:last],
    )

  def document_text(self, doc: int) -> str:
    begin, end = self.text_offsets[doc : doc + 2]
    return self.text[begin:end].tobytes().decode('utf-8')

  def summary(self) -> str:
    """Returns a few lines for the terminal: sizes, split, what was left out."""
    lines = [f'corpus {self.hash[:12]}']
    shares = np.asarray(self.weights) / sum(self.weights)
    for name, share, count in zip(
      self.sources, shares, self.meta['sources'], strict=True
    ):
      lines.append(
        f'  {name} ({share:.0%}): '
        f'{count["train_documents"]:,} documents, '
        f'{count["train_tokens"]:,} tokens to train on; '
        f'{count["heldout_documents"]:,} and {count["heldout_tokens"]:,} '
        'held out'
      )
      if count['skipped']:
        left_out = text_lib.described(count['skipped'])
        lines.append(f'    left out: {left_out}')
      if count['shared_lines']:
        lines.append(
          f'    {count["shared_lines"]:,} lines dropped that stand on both '
          'sides of the split'
        )
    return '\n'.join(lines)


def prepare(
  sources: Sequence[str],
  weights: Sequence[float],
  tokenizer: Tokenizer,
  cache_dir: str,
  heldout_fraction: float,
  workers: int | None = None,
) -> Corpus:
  """Returns the index of these sources, building it if it is not there yet.

  Any number of processes may do so at once where they share `cache_dir`: they
  build one index together. One that was killed left its shards for the next.

  Args:
    sources: as in sources.py.
    weights: mixture weights, one a source; not part of the index.
    heldout_fraction: share of documents held out, by a hash of their text; 0
      and 1 leave the other side empty, anything between fills both.
    workers: processes that build it; as in pool.py.

  Raises:
    UserError: a source, a weight or the share is none that can be used.
  """
  if not sources:
    raise UserError('data.text names no source')
  if len(weights) != len(sources) or min(weights) <= 0:
    raise UserError(
      f'data.weights {tuple(weights)}: one positive weight for each of the '
      f'{len(sources)} sources of data.text'
    )
  if not 0 <= heldout_fraction <= 1:
    raise UserError(f'data.heldout_fraction {heldout_fraction}: from 0 to 1')
  job = index.job(sources, tokenizer, cache_dir, heldout_fraction)
  while (directory := index.follow(job.pointer)) is None:
    os.makedirs(cache_dir, exist_ok=True)
    _sweep(cache_dir, job)
    try:
      pool.prepare(job, tokenizer, workers)
    except UserError:  # its shards are of no use to other text
      _remove(job)
      raise
    _remove(job)
  meta, arrays = index.load(directory)
  for name in index.ARRAYS:
    if name not in index.LARGE:  # small, and read at every step
      arrays[name] = np.array(arrays[name])
  return Corpus(
    directory, meta['hash'], tuple(sources), tuple(weights), meta, **arrays
  )


def _remove(job: index.Job) -> None:
  """Removes the shards at once from the sight of others, then from disk."""
  done = os.path.join(job.cache_dir, f'.building-{uuid.uuid4().hex}')
  with contextlib.suppress(OSError):  # another process did
    os.rename(job.directory, done)
  shutil.rmtree(done, ignore_errors=True)


def _sweep(cache_dir: str, job: index.Job) -> None:
  """Removes what runs left that never came back, a day later."""
  for entry in os.scandir(cache_dir):
    mine = entry.name == os.path.basename(job.directory)
    if entry.name.startswith('.building-') and not mine:
      with contextlib.suppress(FileNotFoundError):
        if time.time() - entry.stat().st_mtime > 86400:
          shutil.rmtree(entry.path, ignore_errors=True)
