r"""The token index of a text by one worker, by two, by two runs at once, and by
runs that are killed: the same files? And how fast?

  PYTHONPATH=. .venv/bin/python docs/bench/prepare.py TEXT [TEXT ...] \
    [--megabytes=100] [--tokenizer=bytes] [--scratch=DIR]

A TEXT is a source as in config.data.text. Their documents are repeated, each
copy with a line that numbers it, until they are so many megabytes of JSONL.
A worker is one process that uses one core. For each way the table gives the
wall time of `corpus.prepare`, with the start of its workers, the CPU time of
all its processes, and the most memory that one of them took. Exit code 1 where
two ways differ in a single byte.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter

from refrag_jax.data import tokenizers
from refrag_jax.data.text import corpus
from refrag_jax.data.text import sources as text

KILLS = 5
ROW = '| {} | {:.1f} | {:.1f} | {:.2f} | {:.2f} | {:.2f} | {:.0f} | {} |'


def prepare_once(source: str, cache: str, tokenizer: str, workers: int) -> None:
  """What a process of the table does; prints its times as JSON."""
  loaded = tokenizers.load(tokenizer)
  print('begun', flush=True)
  start = time.monotonic()
  made = corpus.prepare([source], [1.0], loaded, cache, 0.1, workers)
  wall = time.monotonic() - start
  own, of_workers = (
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  print(
    json.dumps(
      {
        'wall': wall,
        'cpu': of_workers.ru_utime + of_workers.ru_stime,
        'peak': of_workers.ru_maxrss / 1024
        if workers
        else own.ru_maxrss / 1024,
        'tokens': len(made.tokens),
        'hash': made.hash,
      }
    )
  )


def write_text(sources: list[str], path: str, size: int) -> tuple[int, int]:
  """Repeats documents into a JSONL file; returns its size and that of all."""
  written = of_text = copy = 0
  with open(path, 'w', encoding='utf-8') as f:
    while written < size:
      before = written
      for source in sources:
        for document in text.documents(source, Counter()):
          made = document.text + (f'\nCopy {copy} of it.\n' if copy else '')
          written += f.write(json.dumps({'text': made}) + '\n')
          of_text += len(made.encode())
          if written >= size:
            return written, of_text
      if before == written:
        raise SystemExit('no documents there')
      copy += 1
  return written, of_text


def fingerprint(cache: str) -> str:
  """A hash of all files' names and bytes; times and places are not in it."""
  total = hashlib.sha256()
  for folder, _, names in sorted(os.walk(cache)):
    for name in sorted(names):
      path = os.path.join(folder, name)
      total.update(os.path.relpath(path, cache).encode())
      with open(path, 'rb') as f:
        total.update(hashlib.file_digest(f, 'sha256').digest())
  return total.hexdigest()


class Bench:
  """One text; each way to prepare it begins with an empty cache."""

  def __init__(self, source: str, tokenizer: str, scratch: str):
    self._source, self._tokenizer = source, tokenizer
    self._cache = os.path.join(scratch, 'cache')

  def start(self, workers: int) -> subprocess.Popen:
    process = subprocess.Popen(
      [
        sys.executable,
        os.path.abspath(__file__),
        self._source,
        f'--tokenizer={self._tokenizer}',
        f'--cache={self._cache}',
        f'--workers={workers}',
      ],
      stdout=subprocess.PIPE,
      text=True,
    )
    assert process.stdout.readline() == 'begun\n'
    return process

  def end(self, process: subprocess.Popen) -> dict:
    said, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(said.splitlines()[-1])

  def clear(self) -> None:
    shutil.rmtree(self._cache, ignore_errors=True)

  def at_once(self, processes: int, workers: int) -> dict:
    """Prepares the text in some runs of some workers each."""
    self.clear()
    started = [self.start(workers) for _ in range(processes)]
    return self._all([self.end(process) for process in started])

  def killed(self, workers: int, seconds: float) -> dict:
    """Kills runs in between; the last one goes to the end."""
    self.clear()
    wait, walls = random.Random(0), []
    for _ in range(KILLS):
      process, start = self.start(workers), time.monotonic()
      time.sleep(seconds / (KILLS + 1) * wait.uniform(0.7, 1.3))
      process.kill()
      process.communicate()
      walls.append(time.monotonic() - start)
    last = self._all([self.end(self.start(workers))])
    return last | {'wall': last['wall'] + sum(walls), 'cpu': float('nan')}

  def _all(self, done: list[dict]) -> dict:
    return done[0] | {
      'wall': max(of_one['wall'] for of_one in done),
      'cpu': sum(of_one['cpu'] for of_one in done),
      'peak': max(of_one['peak'] for of_one in done),
      'files': fingerprint(self._cache),
    }


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('sources', nargs='+')
  parser.add_argument('--megabytes', type=int, default=100)
  parser.add_argument('--tokenizer', default='bytes')
  parser.add_argument('--scratch')
  parser.add_argument('--cache')
  parser.add_argument('--workers', type=int)
  flags = parser.parse_args()
  if flags.cache:
    (source,) = flags.sources
    prepare_once(source, flags.cache, flags.tokenizer, flags.workers)
    return 0
  with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
    path = os.path.join(scratch, 'text.jsonl')
    written, of_text = write_text(flags.sources, path, flags.megabytes * 10**6)
    bench = Bench(path, flags.tokenizer, scratch)
    rows = {'one worker': bench.at_once(1, 1), 'two': bench.at_once(1, 2)}
    rows['two runs of one'] = bench.at_once(2, 1)
    seconds = rows['two']['wall']
    rows[f'two, killed {KILLS} times'] = bench.killed(2, seconds)
  one = rows['one worker']
  print(
    f'{written:,} bytes of JSONL, {of_text:,} of text, {one["tokens"]:,} '
    f'tokens of {flags.tokenizer}; index {one["hash"][:12]}'
  )
  print('| | wall, s | CPU, s | MB/s | MB a CPU second | of one | MB | files |')
  print('|---|---|---|---|---|---|---|---|')
  for name, row in rows.items():
    rate = of_text / 1e6 / row['wall']
    print(
      ROW.format(
        name,
        row['wall'],
        row['cpu'],
        rate,
        of_text / 1e6 / row['cpu'],
        one['wall'] / row['wall'],
        row['peak'],
        row['files'][:12],
      )
    )
  return int(len({row['files'] for row in rows.values()}) > 1)


if __name__ == '__main__':
  sys.exit(main())
