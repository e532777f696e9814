"""The config of an import or an export that names none: it is in what is read.

Needs no JAX: the config says how JAX is to be started.
"""

import os
from typing import Any

from refrag_jax.errors import UserError
from refrag_jax.hf import families, hub
from refrag_jax.runtime import files

EXPORT = 'refrag.json'
SAVED = ('config.json', 'config_import.json')  # beside a run's checkpoints


def of_run(source: str) -> tuple[str, dict[str, Any]] | None:
  """The run that a checkpoint lies in, and the record of its config.

  Args:
    source: RUN/checkpoints/STAGE, or a step in there.

  Raises:
    UserError: there is no config of a run.
  """
  checkpoint = os.path.realpath(source)
  while os.path.basename(os.path.dirname(checkpoint)) != 'checkpoints':
    checkpoint, before = os.path.dirname(checkpoint), checkpoint
    if checkpoint == before:
      return None
  run = os.path.dirname(os.path.dirname(checkpoint))
  imported = os.path.basename(checkpoint) == 'imported'
  for name in SAVED[::-1] if imported else SAVED:
    path = os.path.join(run, name)
    if os.path.exists(path):
      record = files.read_json(path)
      if not (isinstance(record, dict) and {'config', 'sources'} <= {*record}):
        raise UserError(
          f'{path} holds no config of a run: add --config=FILE.py'
        )
      return run, record
  return None


def saved_config(
  source: str,
) -> tuple[str, dict[str, Any], dict[str, str]] | None:
  """The config that the parameters of a checkpoint or an export go with.

  Returns:
    The run that it lies in ('': none), the values, and where each came from;
    None where nothing of the kind is there.

  Raises:
    UserError: it is there and cannot be used.
  """
  path = os.path.join(source, EXPORT)
  if os.path.exists(path):
    saved = files.read_json(path).get('config')
    if saved is None:
      raise UserError(
        f'{path} has no config, for it was written by an earlier version: '
        'export again, or name the checkpoint itself'
      )
    # Beside an export are its tokenizers, unless they are bytes.
    for group, name in (
      ('decoder', 'tokenizer'), ('encoder', 'encoder_tokenizer')
    ):  # fmt: skip
      beside = os.path.join(source, group)
      if saved['data'][name] != 'bytes' and os.path.isdir(beside):
        saved['data'][name] = beside
    return '', saved, {}
  found = of_run(source)
  return found and (found[0], found[1]['config'], dict(found[1]['sources']))


def pair(source: str) -> str:
  """'DECODER,ENCODER' of two models in any order; '' where it is not two."""
  names = [name.strip() for name in source.split(',')]
  group_of = {}
  for name in names if len(names) == 2 else ():
    directory = hub.resolve(name, weights=False)
    values = families.read_config(directory)
    family = families.family_of(values, directory)
    group_of[families.FAMILIES[family].group] = name
  return ','.join(group_of[group] for group in sorted(group_of))
