"""SIGTERM and SIGINT, asked of whoever can save what is under way."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from refrag_jax.progress import say


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
  """SIGTERM or SIGINT asks to stop at the next step; a second SIGINT now."""
  stop = threading.Event()

  def ask(signum, frame):
    del frame
    if stop.is_set() and signum == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice by hand: leave at once
    stop.set()
    say(f'{signal.Signals(signum).name}: stopping after this step')

  old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for s, handler in old.items():
      signal.signal(s, handler)
