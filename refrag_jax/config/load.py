"""A checked, frozen config from what a file or a command line says."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from refrag_jax.config import check, typed
from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.runtime import paths


def build(config: Any) -> Config:
  """Turns a ConfigDict or nested dict into a `Config`.

  Args:
    config: as a config file's `get_config` returns it. `data.weights` may be
      () for equal shares.

  Returns:
    The checked, frozen config.

  Raises:
    UserError: a key is unknown or missing, a type is wrong, or the
      combination cannot work; one line that says what to do.
  """
  values = config.to_dict() if hasattr(config, 'to_dict') else config
  built = typed.convert(values, Config, '')
  if not built.data.weights and built.data.text:
    num = len(built.data.text)
    data = dataclasses.replace(built.data, weights=(1.0 / num,) * num)
    built = dataclasses.replace(built, data=data)
  built = _with_local_paths(built)
  check.check(built)
  return built


def _with_local_paths(config: Config) -> Config:
  """The config with `~` put in, wherever a path may stand."""

  def local(section: Any, prefix: str, *names: str) -> Any:
    found = {}
    for name in names:
      value, key = getattr(section, name), f'config.{prefix}{name}'
      if isinstance(value, str):
        found[name] = paths.source(value, key)
      else:
        # A comma in one of several paths is the path's own.
        found[name] = tuple(
          paths.local(x, key) if ',' in x else paths.source(x, key)
          for x in value
        )
    return dataclasses.replace(section, **found)

  return dataclasses.replace(
    local(config, '', 'init_from'),
    data=local(
      config.data, 'data.', 'text', 'tokenizer', 'encoder_tokenizer',
      'cache_dir', 'questions',
    ),
    eval=local(config.eval, 'eval.', 'data', 'questions'),
    repro=local(config.repro, 'repro.', 'claims'),
    stage={
      name: local(stage, f'stage.{name}.', 'init_from')
      for name, stage in config.stage.items()
    },
  )  # fmt: skip


def changed(config: Config, changes: Sequence[str]) -> Config:
  """The config with values set as on the command line, checked again.

  Args:
    changes: such as 'model.chunk_size=16' or 'stage.cpt.factors=(1,2,4)'.

  Raises:
    UserError: a key is unknown, a value has the wrong type or cannot work.
  """
  for change in changes:
    key, equals, text = change.partition('=')
    known = typed.flatten(dataclasses.asdict(config))
    if not equals or key not in known:
      hint = typed.did_you_mean(key, known)
      raise UserError(f'there is no config key to set in {change!r}{hint}')
    value = typed.parse(text, typed.field_type(Config, key), key)
    config = _replaced(config, key.split('.'), value)
  config = _with_local_paths(config)
  check.check(config)
  return config


def _replaced(node: Any, path: Sequence[str], value: Any) -> Any:
  if not path:
    return value
  name, *rest = path
  if isinstance(node, dict):
    return node | {name: _replaced(node[name], rest, value)}
  inner = _replaced(getattr(node, name), rest, value)
  return dataclasses.replace(node, **{name: inner})
