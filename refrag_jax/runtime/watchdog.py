"""Says where a process hangs: the phase it is in, and every thread's stack.

A collective waits for ever for a device that does not come, and so does a read
from a dead disk; the log just ends. Whoever works says what it does with
`phase`, and a thread that sees the same phase for too long writes it down. It
ends nothing: what looks like a hang may be a slow compilation.
"""

import contextlib
import faulthandler
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

# One process does one thing at a time, wherever in the code it does it.
_now = ['start', 0.0]


def phase(name: str) -> None:
  """What this process does from now on, such as 'lm, step 12'."""
  _now[:] = name, time.monotonic()


def current() -> tuple[str, float]:
  """The phase, and since when by time.monotonic."""
  return _now[0], _now[1]


@contextlib.contextmanager
def watch(seconds: float, out: TextIO = sys.stderr) -> Iterator[None]:
  """Watches the phases that pass in here.

  Args:
    seconds: what no phase should take; 0 watches nothing.
    out: a file with a descriptor; stacks of C++ are not in there.
  """
  if not seconds:
    yield
    return
  phase('start')
  with beside(functools.partial(_look, seconds, out), 'watchdog'):
    yield


@contextlib.contextmanager
def beside(
  look: Callable[[threading.Event], None], name: str
) -> Iterator[None]:
  """Runs `look` in a thread, which is to end when its event is set."""
  done = threading.Event()
  thread = threading.Thread(target=look, args=(done,), daemon=True, name=name)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _look(seconds: float, out: TextIO, done: threading.Event) -> None:
  told = 0.0  # each phase is told of once
  while not done.wait(seconds / 10):
    name, since = _now
    if since != told and time.monotonic() - since > seconds:
      told = since
      # Not by JAX's number: to ask for it waits for JAX, which may hang.
      print(
        f'refrag_jax: process {os.getpid()} of {socket.gethostname()} has been '
        f'at "{name}" for {seconds:g} s (config.cluster.hang_seconds); all '
        'threads:',
        file=out,
        flush=True,
      )
      faulthandler.dump_traceback(out, all_threads=True)
