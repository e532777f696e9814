"""Who works on which unit of an index (index.py), without a word to others.

A worker takes any unit that is not done and that nobody works on, until none
is left. All that workers share is the directory of the job: so they may be
processes of one run, of all hosts of a cluster, or of runs that know nothing
of each other.

A unit that is worked on has a claim: a symbolic link, because its text is there
from the first moment, that names the machine and the process. Its time is set
again every BEAT seconds. Of a process that is no
more, or that gave no sign for LEASE seconds, others take the unit over. That
two do the same is harmless, if it should happen: both make the same file.

As a program, `python -m refrag_jax.data.text.workers` reads a job from its
standard input, and ends when that closes: no worker outlives the run that
started it.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable

from refrag_jax.data import tokenizers
from refrag_jax.data.text import index
from refrag_jax.errors import UserError

BEAT = 10.0
# Several beats, and longer than a network file system keeps a file's time.
LEASE = 120.0
PAUSE = 2.0  # the longest between two looks at what others do
VANISHED = (errno.ENOENT, errno.ESTALE)


class Claims:
  """The claims of this process in one directory."""

  def __init__(self, directory: str):
    self._directory = directory
    self._held: set[str] = set()
    self._seen: dict[str, tuple[float, float]] = {}
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)

  def __enter__(self) -> 'Claims':
    os.makedirs(self._directory, exist_ok=True)
    self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._closed.set()
    self._thread.join()
    for name in list(self._held):
      self.release(name)

  def take(self, name: str) -> bool:
    """Claims what nobody has; whether this process has it now."""
    path = os.path.join(self._directory, name)
    if self._is_stale(path):
      _unlink(path)
    try:
      os.symlink(f'{machine()} {os.getpid()}', path)
    except FileExistsError:
      return False
    self._held.add(name)
    return True

  def release(self, name: str) -> None:
    self._held.discard(name)
    _unlink(os.path.join(self._directory, name))

  def _is_stale(self, path: str) -> bool:
    """Whether a claim is there, and whoever made it is not."""
    try:
      where, _, process = os.readlink(path).rpartition(' ')
      changed = os.lstat(path).st_mtime
    except FileNotFoundError:
      return False
    if where == machine() and not _is_alive(int(process)):
      return True
    # By this machine's clock: those of others may go wrong.
    before, since = self._seen.get(path, (None, 0.0))
    if before != changed:
      self._seen[path] = changed, time.monotonic()
      return False
    return time.monotonic() - since > LEASE

  def _beat(self) -> None:
    while not self._closed.wait(BEAT):
      for name in ['', *self._held]:
        try:
          path = os.path.join(self._directory, name)
          os.utime(path, follow_symlinks=False)
        except OSError:  # taken over, or all is done
          continue


def _unlink(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)


@functools.cache
def machine() -> str:
  """What processes have in common that see each other by their number."""
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='utf-8') as f:
      return f'{f.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # another user's
  try:
    with open(f'/proc/{process}/stat', encoding='utf-8') as f:
      return f.read().rpartition(')')[2].split()[0] not in 'ZX'  # ended
  except OSError:
    return True


def work(
  job: index.Job,
  claims: Claims,
  tokenizer: Callable[[], tokenizers.Tokenizer],
  tell: Callable[[], None] = lambda: None,
) -> None:
  """Works until the index is there, be it by others.

  Args:
    tell: is called after each unit and while others work.
  """
  tries = 0
  while index.follow(job.pointer) is None:
    try:
      for stage in index.STAGES:
        _complete(stage, job, claims, tokenizer, tell)
    except index.DamagedError:
      continue  # each one is away, and is made again
    except OSError as e:
      # Who is done renames what others still look at.
      if e.errno not in VANISHED or (tries := tries + 1) == 10:
        raise
      if not os.path.isdir(job.directory):
        return
      time.sleep(0.1 * tries)


def _complete(stage, job, claims, tokenizer, tell) -> None:
  """Works on a stage until all its units are done."""
  pause = PAUSE / 64
  while left := stage.left(job):
    # Each begins elsewhere, so that few ask for the same.
    first, found = random.Random().randrange(len(left)), False
    for unit in left[first:] + left[:first]:
      claim = f'{stage.name}-{unit}'
      if stage.is_done(job, unit) or not claims.take(claim):
        continue
      try:
        if not stage.is_done(job, unit):
          stage.run(job, unit, tokenizer)
          found = True
      finally:
        claims.release(claim)
      tell()
    if not found:
      tell()
      time.sleep(pause)
      pause = min(2 * pause, PAUSE)


def main() -> int:
  """Reads a job, works on it, and says by its output what went wrong."""
  job = index.Job(**json.loads(sys.stdin.readline()))
  # What libraries print must not fill a pipe that is read at the end.
  answer = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  threading.Thread(target=_end_with_parent, daemon=True).start()

  @functools.cache
  def tokenizer():
    loaded = tokenizers.load(job.tokenizer)
    if loaded.fingerprint != job.fingerprint:
      raise UserError(
        f'the tokenizer {job.tokenizer} changed while the text was prepared; '
        'run the same command again'
      )
    return loaded

  try:
    with Claims(job.path('claims')) as claims:
      work(job, claims, tokenizer)
  except UserError as e:
    print(json.dumps({'user': str(e)}), file=answer, flush=True)
    return 1
  except OSError as e:
    error = {'disk': [e.errno, e.strerror, e.filename]}
    print(json.dumps(error), file=answer, flush=True)
    return 1
  return 0


def _end_with_parent() -> None:
  sys.stdin.read()
  os._exit(1)


def job_line(job: index.Job) -> str:
  return json.dumps(dataclasses.asdict(job)) + '\n'


if __name__ == '__main__':
  sys.exit(main())
