"""Files that appear whole or not at all, most of them JSON."""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from refrag_jax.errors import UserError


def plain(value: Any) -> Any:
  """NumPy and JAX values as what JSON knows; non-finite numbers as None.

  JSON has no NaN, and a file that other tools cannot read is worth nothing.
  """
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, bool | int | str | None):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if hasattr(value, 'tolist'):
    return plain(np.asarray(value).tolist())
  return str(value)


@contextlib.contextmanager
def writing(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
  """A binary file that appears whole or not at all: then with a rename.

  Args:
    sync: put it on disk before the rename, so that it is whole after a power
      cut as well; that the name is there then takes `sync_directory`.
  """
  folder = os.path.dirname(os.path.abspath(path))
  handle, temporary = tempfile.mkstemp(dir=folder, prefix='.writing-')
  try:
    with os.fdopen(handle, 'wb') as f:
      yield f
      f.flush()
      if sync:
        os.fsync(f.fileno())
    os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 hides results
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def sync_directory(folder: str | os.PathLike) -> None:
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as e:
    if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every disk can
      raise
  finally:
    os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a whole file or nothing, and its directory if that lacks."""
  folder = os.path.dirname(os.path.abspath(path))
  os.makedirs(folder, exist_ok=True)
  with writing(path) as f:
    f.write(text.encode('utf-8'))
  sync_directory(folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
  text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
  write_text(path, text + '\n')


def read_json(path: str | os.PathLike) -> Any:
  """A JSON file of ours; refuses one that is no JSON."""
  with open(path, encoding='utf-8') as f:
    try:
      return json.load(f)
    except ValueError as e:
      raise UserError(
        f'{os.fspath(path)} is not JSON ({e}); move it away and run again'
      ) from e


def json_line(value: dict[str, Any]) -> str:
  return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + '\n'


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a JSONL file; [] if there is none.

  A process that is killed while it appends leaves a torn line. It is skipped:
  the run that continues writes that step again.
  """
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8', errors='replace') as f:
    return list(_records(f))


def _records(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
  for line in lines:
    try:
      record = json.loads(line)
    except ValueError:
      continue
    if isinstance(record, dict):
      yield record


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
