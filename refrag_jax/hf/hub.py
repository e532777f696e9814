"""Models of the Hugging Face hub by name; the only file that talks to it.

Also what holds of any file of a model's directory, however it was fetched.
"""

import functools
import json
import os
import re
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from refrag_jax.errors import UserError
from refrag_jax.hf import gguf
from refrag_jax.runtime.paths import refuse_pointer

# No pickles: what could run a program is not even fetched.
SMALL = ('*.json', '*.model', '*.jinja', 'vocab.txt', 'merges.txt')
WEIGHTS = ('*.safetensors',)
TWICE = ('consolidated*', 'original/*')  # the same weights in another layout
NAME = re.compile(r'[\w.-]+/[\w.-]+(@[\w./-]+)?')


def is_name(name: str) -> bool:
  """Whether this is written like a hub name, and not like a path here."""
  owner = name.split('/')[0]
  if os.path.isdir(owner) or gguf.is_file(name):
    return False
  return bool(NAME.fullmatch(name))


@functools.lru_cache(maxsize=16)  # one answer a process, whatever the hub does
def resolve(name: str, weights: bool = True) -> str:
  """The directory of a model: itself, or where the hub's copy of it lies.

  Args:
    name: a directory, a GGUF file or a directory with one, or a hub name such
      as 'HuggingFaceTB/SmolLM2-135M'; with '@' and a branch, tag or commit
      behind it, that version.
    weights: of a hub name; without them only what describes the model.

  Raises:
    UserError: it is neither, is gated, or there is no network and no copy.
  """
  if gguf.is_file(name):
    return gguf.unpack(name)
  if os.path.isdir(name):
    file = gguf.in_directory(name)
    return gguf.unpack(file) if file else name
  if not is_name(name):
    raise UserError(
      f'{name} is no directory, and no name of the Hugging Face hub either '
      '(those are written OWNER/MODEL or OWNER/MODEL@REVISION)'
    )
  name, _, revision = name.partition('@')
  try:
    return huggingface_hub.snapshot_download(
      name,
      revision=revision or None,
      allow_patterns=[*SMALL, *(WEIGHTS if weights else ())],
      ignore_patterns=TWICE,
    )
  except hub_errors.GatedRepoError:
    raise UserError(
      f'{name} is gated: accept its licence at https://huggingface.co/{name} '
      'with your account, then set HF_TOKEN to a token of it'
    ) from None
  except hub_errors.RevisionNotFoundError:
    raise UserError(
      f'{name} has no version {revision}: see '
      f'https://huggingface.co/{name}/commits/main'
    ) from None
  except hub_errors.RepositoryNotFoundError:
    raise UserError(
      f'the hub has no {name}, or shows it to members only: check the name, '
      'and set HF_TOKEN if it is private'
    ) from None
  except hub_errors.LocalEntryNotFoundError:
    raise UserError(
      f'{name} is neither a directory nor in the local cache of the hub, and '
      'the hub cannot be reached: fetch it where there is a network '
      f'(hf download {name}), and name the directory here'
    ) from None
  except Exception as e:  # its network libraries raise errors of their own
    reason = str(e).strip().split('\n')[0][:200]
    raise UserError(
      f'{name} could not be fetched from the hub: {reason}'
    ) from e


def read_json(path: str) -> Any:
  """A JSON file of a model's directory, in any Unicode, marked or not.

  Raises:
    UserError: the file is cut off, or no JSON.
  """
  refuse_pointer(path)
  with open(path, 'rb') as f:
    data = f.read()
  try:
    return json.loads(data)
  except ValueError as e:
    what = f'damaged or cut off ({e})' if data.strip() else 'empty'
    raise UserError(f'{path} is {what}: download it again') from None
