"""Parameters that come from Hugging Face directories, or from our own exports.

A source is what `config.init_from` or `--from` names: one model or two
(a decoder, an encoder, comma between them), by directory or hub name; or a
directory that `--mode=export` wrote, with refrag.json and all of its groups.
"""

import dataclasses
import os
from typing import Any, NamedTuple

from refrag_jax.config.schema import (
  DecoderConfig,
  EncoderConfig,
  LoraConfig,
  ModelConfig,
  PolicyConfig,
)
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, families, gguf, hub
from refrag_jax.hf.found import EXPORT

FORMAT = 1
SMALL = ('projection', 'policy', 'cross')  # groups that are one file
# Of an export of changes: all arrays that training has changed, of all groups.
CHANGES = 'changes.safetensors'


class Source(NamedTuple):
  where: str  # as the user named it
  paths: dict[str, str]  # group: a model's directory, or a file of arrays
  numbers: dict[str, Any]  # the configs of decoder, encoder, policy in there
  exported: dict[str, Any]  # refrag.json; {} of Hugging Face models
  names: dict[str, str]  # group: what the user called it; {} of an export


def is_source(name: str) -> bool:
  """Whether this is for us to read: anything but a stage's checkpoint."""
  if ',' in name or gguf.is_file(name):
    return True
  if os.path.isdir(name):
    if os.path.exists(os.path.join(name, EXPORT)):
      return True
    if families.adapter_in(name):  # to say why not
      return True
    if gguf.in_directory(name):
      return True
    path = os.path.join(name, 'config.json')  # which our runs have as well
    return os.path.exists(path) and 'model_type' in families.read_config(name)
  return hub.is_name(name)


def locate(name: str) -> Source:
  """Finds the models of a source and reads what they say of themselves.

  Raises:
    UserError: one is missing or of an unsupported kind, or two are of one.
  """
  path = os.path.join(name, EXPORT)
  if os.path.exists(path):
    try:
      return _exported(name, hub.read_json(path))
    except (KeyError, TypeError, AttributeError) as e:
      raise UserError(f'{path} is not what an export writes: {e!r}') from None
  paths, numbers, names = {}, {}, {}
  for part in map(str.strip, name.split(',')):
    directory = hub.resolve(part)
    values = families.read_config(directory)
    family = families.family_of(values, directory)
    group = families.FAMILIES[family].group
    if group in paths:
      raise UserError(f'{name} names two models that are a {group}')
    paths[group], names[group] = directory, part
    if group == 'decoder':
      numbers[group] = families.decoder_config(values, directory)
    else:
      numbers[group] = families.encoder_config(
        values, families.pooling(directory), directory
      )
  return Source(name, paths, numbers, {}, names)


def _exported(name: str, saved: dict[str, Any]) -> Source:
  if saved.get('format') != FORMAT:
    raise UserError(
      f'{name} is an export of format {saved.get("format")}, this version '
      f'reads {FORMAT}'
    )
  for file, digest in saved['sha256'].items():
    path = os.path.join(name, file)
    if not os.path.exists(path):
      raise UserError(f'{name} lacks {file}, which its {EXPORT} names')
    info = os.stat(path)
    if convert.digest(path, info.st_size, info.st_mtime_ns) != digest:
      raise UserError(
        f'{path} is damaged: its SHA-256 is not the one in {EXPORT}'
      )
  file_of = lambda group: f'{group}.safetensors' if group in SMALL else group
  if 'changes' in saved:
    file_of = lambda group: CHANGES
  paths = {
    group: os.path.join(name, file_of(group)) for group in saved['groups']
  }
  numbers = {
    'decoder': lambda values: DecoderConfig(**values),
    'encoder': lambda values: EncoderConfig(**values),
    'policy': lambda values: PolicyConfig(**values),
    'lora': lambda values: LoraConfig(**values),
  }
  return Source(
    name,
    paths,
    {
      group: read(saved['model'][group])
      for group, read in numbers.items()
      if group in saved['groups']
    },
    saved,
    {},
  )


def check(
  source: Source, model: ModelConfig, tokenizers: dict[str, str], why: str
) -> None:
  """Refuses a source whose numbers are not those of the config.

  Pooling is no property of the weights: the config may choose another. Nor is
  a decoder's number of positions, where the config sets no bound.

  Args:
    tokenizers: fingerprints of the decoder's and the encoder's.
  """
  for group, theirs in source.numbers.items():
    ours = getattr(model, group)
    if group == 'decoder' and not ours.max_length:
      theirs = dataclasses.replace(theirs, max_length=0)
    if group == 'encoder':
      theirs = dataclasses.replace(theirs, pooling=ours.pooling)
    if group == 'lora':  # dropout is how they are trained
      theirs = dataclasses.replace(theirs, dropout=ours.dropout)
    found = families.differences(ours, theirs)
    if found:
      raise UserError(
        f'{why}, but model.{group} does not fit {source.where}: '
        f'{"; ".join(found[:4])}'
      )
  saved = source.exported
  for group, name in (('projection', 'chunk_size'), ('cross', 'piece_length')):
    if group in source.paths and saved[name] != getattr(model, name):
      raise UserError(
        f'{why}, but {source.where} was trained with model.{name} '
        f'{saved[name]} and here it is {getattr(model, name)}'
      )
  for group, mark in saved.get('tokenizers', {}).items():
    if group in source.paths and mark != tokenizers[group]:
      raise UserError(
        f'{why}, but {source.where} was trained with another tokenizer of its '
        f'{group}: name the one '
        + (
          f'of {saved["changes"]["from"]}'
          if 'changes' in saved
          else f'in {source.where}/{group}'
        )
      )


def read(source: Source, abstract: dict) -> dict:
  """The groups of a source, in the shardings and dtypes of `abstract`.

  Not of an export of changes: `read_changes`.
  """
  return {
    group: (
      convert.load_arrays(path, abstract[group])
      if group in SMALL
      else convert.read_params(path, abstract[group])
    )
    for group, path in source.paths.items()
  }


def read_changes(source: Source, abstract: dict, before: dict) -> dict:
  """Likewise of an export of changes, over the models that it began from."""
  path = os.path.join(source.where, CHANGES)
  return convert.load_arrays(path, abstract, before)


def base(source: Source) -> dict[str, dict[str, Any]]:
  """What an export wants to know of the models that training started from.

  Returns:
    For each group its `name` as the user gave it, its config.json, the types
    of its tensors and the modules of a sentence encoder.
  """
  if source.exported:
    return source.exported.get('base', {})
  return {
    group: {
      'name': source.names[group],
      'config': families.read_config(path),
      'dtypes': convert.dtypes(path),
      'modules': families.modules(path),
    }
    for group, path in source.paths.items()
  }


def fingerprint(source: Source) -> str:
  """Another one for other weights, as far as their headers tell."""
  if source.exported:
    return str(sorted(source.exported['sha256'].items()))
  return ' '.join(convert.fingerprint(path) for path in source.paths.values())
