"""Paths as people write them: `~` and schemes, wherever a path may stand.

A config's paths are made plain once, when it is built; below that, and in what
a run records, a path is one that the operating system takes.
"""

import os
import re

from refrag_jax.errors import UserError

_SCHEME = re.compile(r'[a-z][a-z0-9+.-]+://', re.I)
# What stands in a path's place and is none.
_NAMES = ('', 'bytes', 'stdlib', 'heldout')
_TFDS = 'tfds:'
_LFS = b'version https://git-lfs.github.com/spec/'


def local(path: str, what: str) -> str:
  """The path with `~` put in.

  Args:
    what: is named so, a flag or a config key, for the messages.

  Raises:
    UserError: it lies on another machine, or there is no home directory.
  """
  if _SCHEME.match(path):
    raise UserError(
      f'{what} must be a local path, and {path} is none: mount it first (a '
      'bucket of Google with gcsfuse), or copy it'
    )
  expanded = os.path.expanduser(path)
  if expanded.startswith('~') and not os.path.lexists(expanded):
    raise UserError(
      f'{what} is {path}, and there is no home directory to put for '
      f'{path.split("/")[0]}: set HOME, or write the whole path'
    )
  return expanded


def source(name: str, what: str) -> str:
  """Likewise of what may be a path or a name, or several with commas."""
  if name in _NAMES or name.startswith('@'):
    return name
  if name.startswith(_TFDS):
    return _TFDS + local(name.removeprefix(_TFDS), what)
  return ','.join(local(part, what) for part in name.split(','))


def refuse_pointer(path: str) -> None:
  """Raises UserError if Git LFS has left a pointer and not fetched the file."""
  with open(path, 'rb') as f:
    if f.read(len(_LFS)) == _LFS:
      raise UserError(f'{path} is a Git LFS pointer: run git lfs pull')
