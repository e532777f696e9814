"""A run's workdir: made, and held by one run at a time."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator

from refrag_jax.errors import UserError

NAME = '.lock'


def make(workdir: str) -> None:
  """Makes the directory, where it is not there.

  Raises:
    UserError: there can be none.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise UserError(
      f'--workdir={workdir} is, or lies below, a file: name a directory'
    ) from None
  except FileNotFoundError as e:  # as below /proc, where nothing can be made
    raise UserError(
      f'--workdir={workdir} cannot be made ({e.strerror}): name another'
    ) from None


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Keeps other runs out of a workdir while this one writes there.

  The lock belongs to the open file: the kernel lets go of it however the
  process ends. Where a file system knows no locks, nobody is kept out.

  Raises:
    UserError: another run holds it; says which.
  """
  path = os.path.join(workdir, NAME)
  make(workdir)
  with open(path, 'a+', encoding='utf-8') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      f.seek(0)
      raise UserError(
        f'{workdir} is held by another run ({f.read().strip() or "unknown"}): '
        'wait until it has ended, or name another --workdir'
      ) from None
    except OSError:  # no locks here
      pass
    f.truncate(0)
    since = time.strftime('%Y-%m-%d %H:%M:%S')
    f.write(f'process {os.getpid()} on {socket.gethostname()}, since {since}\n')
    f.flush()
    yield
