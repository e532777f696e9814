"""Parameters that come from Hugging Face directories, or from our own exports.

A source is what `config.init_from` or `--from` names: one model or two
(a decoder, an encoder, comma between them), by directory or hub name; or a
directory that `--mode=export` wrote, with refrag.json and all of its groups.
"""

import dataclasses
import os
from typing import Any, NamedTuple

from refrag_jax import convert_hf, hf_families, hub, results
from refrag_jax.config import ModelConfig
from refrag_jax.errors import UserError

EXPORT = 'refrag.json'
FORMAT = 1
SMALL = ('projection', 'policy')  # groups that are one file of an export


class Source(NamedTuple):
  where: str  # as the user named it
  paths: dict[str, str]  # group: a model's directory, or a file of arrays
  numbers: dict[str, Any]  # 'decoder' and 'encoder': their configs
  exported: dict[str, Any]  # refrag.json; {} of Hugging Face models


def is_source(name: str) -> bool:
  """Whether this is for us to read: anything but a stage's checkpoint."""
  if ',' in name:
    return True
  if os.path.isdir(name):
    files = (EXPORT, 'config.json')
    return any(os.path.exists(os.path.join(name, file)) for file in files)
  return name.count('/') == 1 and not os.path.isabs(name)


def locate(name: str) -> Source:
  """Finds the models of a source and reads what they say of themselves.

  Raises:
    UserError: one is missing or of an unsupported kind, or two are of one.
  """
  path = os.path.join(name, EXPORT)
  if os.path.exists(path):
    return _exported(name, results.read_json(path))
  paths, numbers = {}, {}
  for part in name.split(','):
    directory = hub.resolve(part.strip())
    values = hf_families.read_config(directory)
    family = hf_families.family_of(values, directory)
    group = hf_families.FAMILIES[family].group
    if group in paths:
      raise UserError(f'{name} names two models that are a {group}')
    paths[group] = directory
    if group == 'decoder':
      numbers[group] = hf_families.decoder_config(values, directory)
    else:
      numbers[group] = hf_families.encoder_config(
        values, hf_families.pooling(directory), directory
      )
  return Source(name, paths, numbers, {})


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
    if convert_hf.digest(path) != digest:
      raise UserError(
        f'{path} is damaged: its SHA-256 is not the one in {EXPORT}'
      )
  paths = {
    group: os.path.join(name, f'{group}.safetensors' if group in SMALL else
                        group)
    for group in saved['groups']
  }  # fmt: skip
  return Source(name, paths, saved['model'], saved)


def check(source: Source, model: ModelConfig, why: str) -> None:
  """Refuses a source whose numbers are not those of the config.

  Pooling is no property of the weights: the config may choose another.
  """
  for group, theirs in source.numbers.items():
    ours = getattr(model, group)
    if isinstance(theirs, dict):
      theirs = type(ours)(**theirs)
    if group == 'encoder':
      theirs = dataclasses.replace(theirs, pooling=ours.pooling)
    found = hf_families.differences(ours, theirs)
    if found:
      raise UserError(
        f'{why}, but model.{group} does not fit {source.where}: '
        f'{"; ".join(found[:4])}'
      )
  if source.exported:
    size = source.exported['chunk_size']
    if 'projection' in source.paths and size != model.chunk_size:
      raise UserError(
        f'{why}, but {source.where} was trained with chunks of {size} tokens '
        f'and model.chunk_size is {model.chunk_size}'
      )


def read(source: Source, abstract: dict) -> dict:
  """The groups of a source, in the shardings and dtypes of `abstract`."""
  return {
    group: (
      convert_hf.load_arrays(path, abstract[group])
      if group in SMALL
      else convert_hf.read_params(path, abstract[group])
    )
    for group, path in source.paths.items()
  }


def fingerprint(source: Source) -> str:
  """Another one for other weights, as far as their headers tell."""
  if source.exported:
    return str(sorted(source.exported['sha256'].items()))
  return ' '.join(
    convert_hf.fingerprint(path) for path in source.paths.values()
  )
