"""Signals that ask for a stop, handed to whoever can save what is under way.

`main` asks for this before JAX is imported.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

# A terminal or connection that is lost sends HUP; USR1 and USR2 are what
# schedulers can be told to send before the time is up.
SIGNALS = tuple(
  getattr(signal, name)
  for name in ('SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2')
  if hasattr(signal, name)
)
# A stop that was asked for by an exception: libraries swallow some.
heard = threading.Event()


@contextlib.contextmanager
def handling(
  signals: Iterable[signal.Signals], handler: Callable[[int, Any], None]
) -> Iterator[None]:
  """Hands signals to a function of one's own; afterwards to who had them.

  A HUP that is ignored stays so: whoever wrote `nohup` means to go on.
  """
  old = {
    s: signal.signal(s, handler)
    for s in signals
    if s.name != 'SIGHUP' or signal.getsignal(s) != signal.SIG_IGN
  }
  try:
    yield
  finally:
    for s, before in old.items():
      signal.signal(s, before)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
  """A signal asks to stop at the next step; a second SIGINT stops now.

  So does one that `main` heard before, and that went on all the same.
  """
  from refrag_jax.runtime.progress import say  # here: it imports JAX

  stop = threading.Event()
  if heard.is_set():
    stop.set()

  def ask(signum, frame):
    del frame
    if stop.is_set() and signum == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice by hand: leave at once
    stop.set()
    with contextlib.suppress(RuntimeError):  # it came in the midst of a print
      say(f'{signal.Signals(signum).name}: stopping after this step')

  with handling((*SIGNALS, signal.SIGINT), ask):
    yield stop


def detach(stream: TextIO) -> None:
  """Lets go of a stream whose reader is gone, such as a closed terminal."""
  with contextlib.suppress(OSError, ValueError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
