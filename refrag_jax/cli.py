"""The command line: which config file, which overrides, and where values came
from. Only `main` imports this.

The flags are parsed here and not by absl: ml_collections' own parser answers a
typo with a traceback, cannot override tuples that are empty, refuses 1e3 for a
whole number and knows nothing of the `--config FILE` form.
"""

import contextlib
import dataclasses
import inspect
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from refrag_jax.config import schema as config_lib
from refrag_jax.config import typed
from refrag_jax.config.load import build, changed
from refrag_jax.errors import UserError
from refrag_jax.runtime import environment, paths
from refrag_jax.runtime import workdir as workdir_lib

# Modes whose --from may say the config.
FOUND = ('import', 'export', 'ask', 'bench')
_FLAGS = ('--config', '--workdir', '--mode', '--help')
# Flags of some modes only; see `Command.flags`.
_MODE_FLAGS = (
  '--from', '--to', '--topology', '--question', '--passages', '--expand',
  '--selector',
)  # fmt: skip
# Likewise, and without a value.
_SWITCHES = ('--search', '--schema', '--changes', '--serving')


@dataclasses.dataclass(frozen=True)
class Command:
  """What was typed, before any file is read."""

  mode: str
  config_file: str
  preset: str
  workdir: str
  flags: dict[str, str | bool]  # those of some modes, without dashes
  overrides: dict[str, str | None]  # dotted key: text; None for a bare flag
  help: bool
  argv: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A resolved config and, for each dotted key, where its value came from."""

  config: config_lib.Config
  sources: dict[str, str]
  command: Command


def usage(modes: Mapping[str, tuple], later: Mapping[str, str]) -> str:
  """The text of --help."""
  lines = [
    'python -m refrag_jax.main --config=FILE.py[:preset] [--workdir=DIR]',
    '                          [--mode=MODE] [--config.a.b=value ...]',
    '',
    'Trains and evaluates REFRAG (arXiv 2509.01092). To start with:',
    '  python -m refrag_jax.main --config=configs/tiny.py --workdir=runs/tiny',
    '',
    'modes:',
    *(f'  {name:8}{row[-1]}' for name, row in modes.items()),
    'not there yet:',
    *(f'  {name:8}{text}' for name, text in later.items()),
    '',
    '--workdir is runs/<config.name> unless given; the default mode is train.',
    f'{", ".join(FOUND)} need no --config where --from says it all.',
    'Lists are written 4,2 or (4,2), () is the empty one; --noconfig.a.b is',
    'false. Exit codes: 0 done, 1 failed, 2 the input is wrong, 75 stopped',
    'with its state saved: the same command continues it.',
  ]
  return '\n'.join(lines)


def parse(argv: list[str]) -> Command:
  """Splits the arguments; files and types are looked at in `load`.

  Raises:
    UserError: an argument is unknown, lacks its value or has one too many.
  """
  flags = dict.fromkeys((*_FLAGS[:-1], *_MODE_FLAGS), '')
  flags |= dict.fromkeys(_SWITCHES, False) | {'--mode': 'train'}
  overrides: dict[str, str | None] = {}
  rest, bare = list(argv), []
  while rest:
    raw = rest.pop(0)
    if raw in ('-h', '--help', '-help', '--helpfull', 'help'):
      return Command('', '', '', '', {}, {}, True, tuple(argv))
    if not raw.startswith('-'):
      bare.append(raw)
      continue
    name, equals, value = raw.partition('=')
    name = '--' + name.lstrip('-')  # absl takes one dash too
    text: str | None = value if equals else None
    follows = rest and not rest[0].startswith('--')
    if name in _SWITCHES:
      if equals:
        raise UserError(f'{name} takes no value')
      flags[name] = True
      continue
    if not equals and follows and not name.startswith('--noconfig.'):
      text = rest.pop(0)
    if name in flags:
      if not text:
        raise UserError(f'{name} needs a value: {name}=...')
      flags[name] = text
    elif name.startswith('--noconfig.'):
      if text is not None:
        raise UserError(f'{raw}: --noconfig.* takes no value; it means false')
      overrides[name.removeprefix('--noconfig.')] = 'false'
    elif name.startswith('--config.'):
      overrides[name.removeprefix('--config.')] = text
    else:
      raise UserError(f'unknown flag {name}{_meant_flag(name)}')
  if flags['--mode'] == 'ask' and bare and not flags['--question']:
    flags['--question'] = bare.pop(0)
  if bare:
    raise UserError(
      f'unexpected argument {bare[0]!r}: flags are written --config=FILE.py, '
      'values --config.a.b=value; see --help'
    )
  for name in ('--config', '--workdir'):
    flags[name] = paths.local(flags[name], name)
  for name in ('--from', '--to'):
    flags[name] = paths.source(flags[name], name)
  # The preset begins behind the first .py: it may be of paths, with colons.
  file, colon, preset = flags['--config'].partition('.py:')
  file += '.py' if colon else ''
  return Command(
    mode=flags['--mode'],
    config_file=file,
    preset=preset,
    workdir=flags['--workdir'],
    flags={
      name.lstrip('-'): flags[name] for name in (*_MODE_FLAGS, *_SWITCHES)
    },
    overrides=overrides,
    help=False,
    argv=tuple(argv),
  )


def _meant_flag(name: str) -> str:
  """A flag spelt nearly so, or the config value that was meant."""
  fields = [f'--config.{f.name}' for f in dataclasses.fields(config_lib.Config)]
  top = '--config.' + name.lstrip('-').removeprefix('config').lstrip('.')
  if any(top == f or top.startswith(f + '.') for f in fields):
    return f'; did you mean {top!r}?'
  known = (*_FLAGS, *_MODE_FLAGS, *_SWITCHES)
  return typed.did_you_mean(name, known) or '; see --help'


def load(command: Command) -> Loaded:
  """Runs the config file, applies the overrides and checks the result.

  Raises:
    UserError: there is no config, it does not run, or `build` refuses it.
  """
  if not command.config_file and command.mode in FOUND:
    return _load_found(command)
  if not command.config_file:
    raise UserError(
      'no config: add --config=FILE.py, such as --config=configs/tiny.py'
    )
  plain, tree, defaults = _run_config_file(command)
  before = typed.flatten(tree.to_dict())
  plain_values = typed.flatten(plain.to_dict()) if plain else before
  typed_values = {
    key: _override(key, text, before) for key, text in command.overrides.items()
  }
  for key, value in typed_values.items():
    node = tree
    *parents, last = key.split('.')
    for name in parents:
      node = node[name]
    # The type was checked against the dataclass, which knows better than the
    # default's own: a file may write 1 where a decimal number belongs.
    with node.unlocked(), node.ignore_type():
      node[last] = value  # lazy references to it follow
  after = typed.flatten(tree.to_dict())
  file = os.path.basename(command.config_file)
  sources = {}
  for key, value in after.items():
    if key in typed_values:
      sources[key] = 'command line'
    elif value != before[key]:
      sources[key] = 'follows command line'
    elif key not in plain_values or value != plain_values[key]:
      sources[key] = f'preset {command.preset}'
    elif value == _default(key, defaults):
      sources[key] = 'default'
    else:
      sources[key] = file
  return Loaded(build(tree), sources, command)


def _load_found(command: Command) -> Loaded:
  """The config in what --from names: a run's, or that of a pair of models."""
  from refrag_jax.hf import found

  source = command.flags['from']
  if ',' in source:
    preset = found.pair(source)
    if ',' in preset:
      file = os.path.relpath(environment.ROOT / 'configs' / 'pair.py')
      return load(dataclasses.replace(command, config_file=file, preset=preset))
  elif saved := found.saved_config(source):
    run, values, sources = saved
    config = build(values)
    if command.mode in ('ask', 'bench'):  # whatever it was trained on
      config = dataclasses.replace(config, mesh=config_lib.ANY_DEVICES)
    for key, text in command.overrides.items():
      config = changed(config, [f'{key}={"true" if text is None else text}'])
      sources[key] = 'command line'
    workdir = command.workdir or run
    return Loaded(
      config, sources, dataclasses.replace(command, workdir=workdir)
    )
  raise UserError(
    f'no config: add --config=FILE.py; without it, --mode={command.mode} wants '
    '--from=DECODER,ENCODER or --from=RUN/checkpoints/STAGE with the config of '
    'that run'
  )


def _override(key: str, text: str | None, known: Mapping[str, Any]) -> Any:
  """One override's text as the value that its key's type wants."""
  if key not in known:
    inside = [name for name in known if name.startswith(key + '.')]
    if inside:
      raise UserError(
        f'config.{key} holds several values; set one of them, such as '
        f'--config.{inside[0]}=...'
      )
    hint = typed.did_you_mean(key, known) or '; --mode=config prints all'
    raise UserError(f'unknown config key {key!r}{hint}')
  kind = typed.field_type(config_lib.Config, key) or type(known[key])
  if text is None:
    if kind is not bool:
      raise UserError(f'--config.{key} needs a value: {typed.describe(kind)}')
    text = 'true'
  return typed.parse(text, kind, key)


def _default(key: str, defaults: Mapping[str, Any]) -> Any:
  """The value of configs/common.py; a stage's fields are those of any stage."""
  if key.startswith('stage.'):
    key = 'stage.*.' + key.split('.', 2)[-1]
  return defaults.get(key, _default)  # the function equals no value


def _run_config_file(command: Command) -> tuple[Any, Any, dict[str, Any]]:
  """Executes the file once.

  Returns:
    Its config without a preset (None if none was asked for), the config, and
    the flat defaults of the `common` module that it imports, if it does.
  """
  file = command.config_file
  if not os.path.isfile(file):
    directory = os.path.dirname(file) or '.'
    there = []
    if os.path.isdir(directory):
      there = [
        os.path.join(directory, name) if os.path.dirname(file) else name
        for name in sorted(os.listdir(directory))
        if name.endswith('.py')
      ]
    hint = typed.did_you_mean(file, there)
    raise UserError(f'config file {file} does not exist{hint}')
  with _importable(file), _config_errors(file):
    names = runpy.run_path(file)
    get_config = names.get('get_config')
    if not callable(get_config):
      raise UserError(
        f'config file {file} has no function get_config: see configs/mine.py'
      )
    presets = names.get('PRESETS', {})
    if command.preset and presets and command.preset not in presets:
      hint = typed.did_you_mean(command.preset, presets)
      raise UserError(
        f'{file} has no preset {command.preset!r}'
        + (hint or f'; it has {", ".join(presets)}')
      )
    takes_preset = bool(inspect.signature(get_config).parameters)
    if command.preset and not takes_preset:
      raise UserError(f'{file} has no presets: leave out :{command.preset}')
    tree = get_config(*([command.preset] if command.preset else []))
    plain = get_config() if command.preset else None
    if not hasattr(tree, 'to_dict'):
      raise UserError(
        f'get_config of {file} must return an ml_collections.ConfigDict, not '
        f'{type(tree).__name__}'
      )
    tree.lock()
    return plain, tree, _defaults(names.get('common'))


def run_file(file: str) -> dict[str, Any]:
  """The names that a config file defines.

  Raises:
    UserError: whatever it raises, as one line.
  """
  with _importable(file), _config_errors(file):
    return runpy.run_path(file)


def _defaults(common: Any) -> dict[str, Any]:
  if not (hasattr(common, 'base') and hasattr(common, 'stage')):
    return {}
  defaults = typed.flatten(common.base().to_dict())
  defaults.update(typed.flatten(common.stage().to_dict(), 'stage.*.'))
  return defaults


@contextlib.contextmanager
def _importable(file: str) -> Iterator[None]:
  """Makes `from configs import common` work, wherever the file lies."""
  near = os.path.dirname(os.path.dirname(os.path.abspath(file)))
  path = list(sys.path)
  roots = [near, str(environment.ROOT)]
  sys.path[:0] = [p for p in roots if os.path.isdir(os.path.join(p, 'configs'))]
  try:
    yield
  finally:
    sys.path[:] = path


@contextlib.contextmanager
def _config_errors(file: str) -> Iterator[None]:
  """Whatever a config file raises, as one line with its own line number."""
  try:
    yield
  except UserError:
    raise
  except SyntaxError as e:
    raise UserError(
      f'config file {e.filename or file}, line {e.lineno}: {e.msg}'
    ) from None
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    inside = [
      f for f in frames if os.path.abspath(f.filename) == os.path.abspath(file)
    ]
    line = f', line {inside[-1].lineno}' if inside else ''
    text = ' '.join(str(e).split())
    if "casted to type <class 'tuple'>" in text:
      text += (
        ': a list is wanted; of one value it is written with a comma, (x,)'
      )
    raise UserError(
      f'config file {file}{line}: {type(e).__name__}: {text}'
    ) from None


def announce(loaded: Loaded, workdir: str) -> None:
  """Prints the resolved config and saves it with the run."""
  print_config(loaded, sys.stdout)
  more = len(_shown(loaded, True)) - len(_shown(loaded, False))
  file = loaded.command.config_file
  where = '--mode=config prints' if file else "the run's config.json has"
  print(f'{more} more values are defaults; {where} them all')
  if file:
    save_config(loaded, workdir)


def _shown(loaded: Loaded, everything: bool) -> list[tuple[str, str, str]]:
  """(key, source, value) rows, without the fields that a stage does not use.

  Args:
    everything: whether defaults are among them.
  """
  rows = []
  for key, value in typed.flatten(dataclasses.asdict(loaded.config)).items():
    source = loaded.sources.get(key, 'config.json')
    default = source == 'default'
    unused = key.startswith('stage.') and value in (0, '', ())
    if not default or (everything and not unused):
      if isinstance(value, tuple):  # as it is typed on the command line
        text = f'({",".join(map(str, value))})'
      else:
        text = repr(value)
      rows.append((key, source, text))
  return rows


def print_config(loaded: Loaded, out: TextIO, everything: bool = False) -> None:
  """A table on a terminal, plain aligned lines elsewhere (logs, pipes).

  Args:
    everything: whether defaults are shown as well.
  """
  rows = _shown(loaded, everything)
  if out.isatty():
    # Imported here: it costs more than everything else that --help needs.
    from rich import console, table, text

    grid = table.Table('config', 'source', 'value', title=loaded.config.name)
    for row in rows:
      changed = 'command line' in row[1] or row[1].startswith('preset')
      grid.add_row(*map(text.Text, row), style='bold' if changed else '')
    console.Console(file=out).print(grid)
    return
  wide, wider = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
  for key, source, value in rows:
    print(f'{key:{wide}}  {source:{wider}}  {value}', file=out)


def save_config(loaded: Loaded, workdir: str) -> str:
  """Writes <workdir>/config.json, or config_<mode>.json beside a training's.

  Returns:
    The file's path. It appears whole, by rename.
  """
  mode = loaded.command.mode
  name = 'config.json' if mode == 'train' else f'config_{mode}.json'
  path = os.path.join(workdir, name)
  record = {
    'config': dataclasses.asdict(loaded.config),
    'sources': loaded.sources,
    'command_line': ['python', '-m', 'refrag_jax.main', *loaded.command.argv],
    'versions': environment.versions(),
    'git': environment.git_commit(),
  }
  workdir_lib.make(workdir)
  from refrag_jax.runtime import files

  files.write_json(path, record)
  return path
