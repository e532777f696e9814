"""`--mode=config`: what a config says, what may stand in one, which there are.

With a config file every value and where it came from; with --schema a JSON
schema of what may stand there; without either a list of the files and presets
of configs/, with the size of their models and the time that a run takes.
"""

import dataclasses
import inspect
import json
import pathlib
import re
import sys
import textwrap
import typing
from typing import Any

from refrag_jax import cli
from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.runtime.environment import ROOT
from refrag_jax.runtime.progress import format_count

DRAFT = 'https://json-schema.org/draft/2020-12/schema'
UNITS = str.maketrans({'k': ' k', 'M': ' M', 'G': ' B'})  # of parameters
NAMES = {bool: 'boolean', int: 'integer', float: 'number', str: 'string'}


def run(command: cli.Command) -> int:
  """Prints what was asked for; writes nothing."""
  if command.config_file or command.overrides:  # of no file: load refuses them
    from refrag_jax import resolve

    loaded = cli.load(command)
    resolve.check(loaded.config)
  if command.flags['schema']:
    print(json.dumps(json_schema(), indent=2))
  elif command.config_file:
    cli.print_config(loaded, sys.stdout, everything=True)
  else:
    for line in listing():
      print(line)
  return 0


def json_schema() -> dict[str, Any]:
  """The JSON schema (draft 2020-12) of a config, from its dataclasses."""
  return {'$schema': DRAFT, 'title': 'refrag_jax config'} | _of(Config)


def _of(kind: Any) -> dict[str, Any]:
  """The schema of a field's type."""
  if dataclasses.is_dataclass(kind):
    said, hints = _comments(kind), typing.get_type_hints(kind)
    properties = {}
    for field in dataclasses.fields(kind):
      properties[field.name] = _of(hints[field.name])
      if field.name in said:
        properties[field.name]['description'] = said[field.name]
    return {
      'type': 'object',
      'properties': properties,
      'required': list(properties),
      'additionalProperties': False,
    }
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    return {'type': 'array', 'items': _of(arguments[0])}
  if origin is dict:
    return {'type': 'object', 'additionalProperties': _of(arguments[1])}
  return {'type': NAMES[kind]}


def _comments(kind: type) -> dict[str, str]:
  """What the schema's source says of each field: behind it, or above it."""
  lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
  said, above = {}, []
  for line in lines:
    field = re.match(r'  (\w+): [^#]*(?:# *(.*))?$', line)
    if line.strip().startswith('#'):
      above.append(line.strip().lstrip('# '))
    elif field:
      text = ' '.join(filter(None, [*above, field[2]]))
      said |= {field[1]: text} if text else {}
      above = []
    else:
      above = []
  return said


def listing() -> list[str]:
  """The files of configs/ with their presets, models and times."""
  out = []
  for path in sorted((ROOT / 'configs').glob('*.py')):
    try:
      names = cli.run_file(str(path))
    except UserError as e:
      out.append(f'configs/{path.name}  not usable: {e}')
      continue
    if not callable(names.get('get_config')):
      continue
    title = (names['__doc__'] or '').strip().partition('\n')[0]
    out.append(f'configs/{path.name}  {title}')
    presets = {'': ''} | names.get('PRESETS', {})
    for preset, what in presets.items():
      time = names.get('DURATIONS', {}).get(preset, 'time not measured')
      label = f':{preset}' if preset else '(no preset)'
      facts = '; '.join(filter(None, [what, _size(path, preset), time]))
      out.append(f'  {label:24}{facts}')
  return out


def _size(path: pathlib.Path, preset: str) -> str:
  """Parameters of a config's decoder and encoder."""
  import jax

  from refrag_jax import state
  from refrag_jax.models.refrag import init_params

  argument = f'{path}:{preset}' if preset else str(path)
  try:
    config = cli.load(cli.parse([f'--config={argument}'])).config
  except UserError as e:
    return f'not usable: {e}'
  shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  decoder, encoder = (
    format_count(state.count(shapes[group])).translate(UNITS)
    for group in ('decoder', 'encoder')
  )
  return f'decoder {decoder}, encoder {encoder} parameters'
