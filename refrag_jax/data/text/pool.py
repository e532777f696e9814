"""Prepares an index with all cores: starts workers (workers.py), and waits."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from refrag_jax.data.text import index, workers
from refrag_jax.data.tokenizers import Tokenizer
from refrag_jax.errors import UserError
from refrag_jax.runtime import environment, progress

# Files with less text are prepared by this process: it takes no longer than a
# worker takes to start.
SMALL = 8 << 20
LOOK_EVERY = 0.1
TELL_EVERY = 5.0  # all that is done is listed, for thousands of shards too


def prepare(job: index.Job, tokenizer: Tokenizer, count: int | None) -> None:
  """Works on the job until its index is there, together with whoever does.

  Args:
    count: of workers; None: one a core of this machine, whatever the number of
      runs that prepare text here, and for little text none; 0: none.
  """
  index.open_directory(job)
  tell = _teller(job)
  with workers.Claims(job.path('claims')) as claims:
    if count == 0 or (count is None and job.size < SMALL):
      workers.work(job, claims, lambda: tokenizer, tell)
      return
    names = _slots(count)
    with _Workers(job) as started:
      while not started.are_done():
        while names and (slot := _free(claims, names)):
          names.remove(slot)
          started.start()
        tell()
        time.sleep(LOOK_EVERY)


def _teller(job: index.Job) -> Callable[[], None]:
  """Returns what shows, when enough time has passed, how far the job is."""
  tally, told = progress.Tally('preparing text'), -TELL_EVERY

  def tell():
    nonlocal told
    if time.monotonic() - told >= TELL_EVERY:
      told = time.monotonic()
      tally(*index.stands_at(job))

  return tell


def _slots(count: int | None) -> list[str]:
  """One name a worker; cores are shared with the other runs on a machine."""
  if count is not None:
    return [f'worker-{uuid.uuid4().hex}' for _ in range(count)]
  machine = hashlib.sha256(workers.machine().encode()).hexdigest()[:16]
  if hasattr(os, 'sched_getaffinity'):
    cores = sorted(os.sched_getaffinity(0))
  else:
    cores = range(os.cpu_count() or 1)
  return [f'core-{machine}-{k}' for k in cores]


def _free(claims: workers.Claims, names: list[str]) -> str | None:
  try:
    return next((name for name in names if claims.take(name)), None)
  except FileNotFoundError:  # all is done
    return None


class _Workers:
  """Processes that end with this one, at the latest."""

  def __init__(self, job: index.Job):
    self._job, self._started = job, []

  def __enter__(self) -> '_Workers':
    return self

  def __exit__(self, *exception) -> None:
    for worker in self._started:
      worker.kill()  # each unit is there whole or not at all
    for worker in self._started:
      worker.wait()
      worker.stdout.close()
      with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()

  def start(self) -> None:
    path = [str(environment.ROOT), *filter(None, sys.path)]
    worker = subprocess.Popen(
      [sys.executable, '-m', 'refrag_jax.data.text.workers'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,  # Ctrl-C is for this process alone
      env=os.environ
      | {
        'PYTHONPATH': os.pathsep.join(dict.fromkeys(path)),
        'TOKENIZERS_PARALLELISM': 'false',  # a core is one worker's
      },
    )
    self._started.append(worker)
    with contextlib.suppress(BrokenPipeError):  # its exit code says more
      worker.stdin.write(workers.job_line(self._job))
      worker.stdin.flush()

  def are_done(self) -> bool:
    """Whether the index is there.

    Raises:
      UserError, OSError: what a worker ended with.
    """
    codes = [worker.poll() for worker in self._started]
    for worker, code in zip(self._started, codes):
      if code:
        raise _error(worker.stdout.read(), code)
    # The others wait for a last look at what is done.
    return 0 in codes or not os.path.isdir(self._job.directory)


def _error(said: str, code: int) -> Exception:
  """What a worker said last, as it would have been raised here."""
  try:
    error = json.loads(said)
  except ValueError:
    how = f'signal {-code}' if code < 0 else f'exit code {code}'
    return RuntimeError(
      f'a process that prepared text ended with {how}; the same command goes '
      'on from the shards that are done'
    )
  if 'user' in error:
    return UserError(error['user'])
  return OSError(*error['disk'])
