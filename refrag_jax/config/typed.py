"""Nested values to frozen dataclasses and back, with errors a user can act on.

Everything is derived from `dataclasses.fields`, so that a field added to
`schema.py` is at once checked, overridable on the command line and printed.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from refrag_jax.errors import UserError

_TRUE, _FALSE = ('true', '1', 'yes', 'on'), ('false', '0', 'no', 'off')


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns '; did you mean X?' or '', for the end of an error message.

  Dotted names are compared whole and by their last component: somebody who
  types `stage.cpt.learning_rate` wants to hear of `peak_learning_rate`.
  """
  known = list(known)
  found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
  if not found:
    parent, _, last = name.rpartition('.')
    lasts = {k.rpartition('.')[2] for k in known}
    close = difflib.get_close_matches(last, sorted(lasts), n=3, cutoff=0.6)
    close += sorted(l for l in lasts if len(last) > 3 and last in l)
    same = [k for c in close for k in known if k.rpartition('.')[2] == c]
    # Of several places with that last name, the one nearest to what was typed.
    shared = lambda k: difflib.SequenceMatcher(
      None, parent, k.rpartition('.')[0]
    ).ratio()
    found = sorted(same, key=shared, reverse=True)[:1]
  if not found:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'; did you mean {found[0]!r}?' if found else ''


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested mappings to {'a.b.c': value}; a mapping is never a value itself."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{name}.'))
    else:
      flat[f'{prefix}{name}'] = value
  return flat


def describe(kind: Any) -> str:
  """A type in the user's words, such as 'a whole number'."""
  if typing.get_origin(kind) is tuple:
    return (
      'a list of ' + describe(typing.get_args(kind)[0]).split(' ', 1)[1] + 's'
    )
  return {
    int: 'a whole number',
    float: 'a decimal number',
    bool: 'a true or false',
    str: 'a text',
  }.get(kind, f'a {getattr(kind, "__name__", kind)}')


def field_type(cls: type, key: str) -> Any | None:
  """The declared type of a dotted key below a dataclass, or None if unknown."""
  kind: Any = cls
  for name in key.split('.'):
    if typing.get_origin(kind) is dict:  # stage.<any name>
      kind = typing.get_args(kind)[1]
    elif dataclasses.is_dataclass(kind):
      kind = typing.get_type_hints(kind).get(name)
    else:
      return None
  return kind


def convert(value: Any, kind: Any, key: str) -> Any:
  """Checks one value against a declared type and freezes it.

  Args:
    value: what the config holds; mappings for dataclasses.
    kind: int, float, bool, str, tuple[X, ...], dict[str, X] or a dataclass.
    key: dotted name, for the message.

  Returns:
    The value as `kind`: whole floats as ints, lists as tuples.
  """
  wrong = UserError(
    f'config.{key} must be {describe(kind)}, but is {value!r}: correct it in '
    f'the config file or with --config.{key}=...'
  )
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, Mapping):
      raise wrong
    return _convert_fields(value, kind, key)
  origin = typing.get_origin(kind)
  if origin is dict:
    if not isinstance(value, Mapping):
      raise wrong
    inner = typing.get_args(kind)[1]
    return {
      name: convert(v, inner, f'{key}.{name}') for name, v in value.items()
    }
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise wrong
    inner = typing.get_args(kind)[0]
    return tuple(convert(v, inner, key) for v in value)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if kind is float and is_number and math.isfinite(value):
    return float(value)
  if kind is int and is_number and math.isfinite(value) and value == int(value):
    return int(value)
  if kind in (bool, str) and isinstance(value, kind):
    return value
  raise wrong


def _convert_fields(values: Mapping[str, Any], cls: type, key: str) -> Any:
  hints = typing.get_type_hints(cls)
  prefix = f'{key}.' if key else ''
  for name in values:
    if name not in hints:
      known = [f'{prefix}{known}' for known in hints]
      raise UserError(
        f'unknown config key {prefix + str(name)!r}'
        + (did_you_mean(prefix + str(name), known) or '; delete it')
      )
  missing = [
    field.name
    for field in dataclasses.fields(cls)
    if field.name not in values and field.default is dataclasses.MISSING
  ]
  if missing:
    raise UserError(
      f'config.{prefix}{missing[0]} is missing: set it in the config file '
      f'({describe(hints[missing[0]])})'
    )
  return cls(
    **{
      name: convert(value, hints[name], prefix + name)
      for name, value in values.items()
    }
  )


def parse(text: str, kind: Any, key: str) -> Any:
  """A command line's text as a value of the declared type.

  Args:
    text: such as '1e3', 'true', '4,2', '(4,2)' or '()'.
    kind: int, float, bool, str or tuple[X, ...].
    key: dotted name, for the message.

  Returns:
    The typed value; whole numbers may be written as 1e3.

  Raises:
    UserError: the text is no value of that type.
  """
  wrong = UserError(f'--config.{key}={text}: expected {describe(kind)}')
  if typing.get_origin(kind) is tuple:
    inner = typing.get_args(kind)[0]
    body = text.strip()
    if body[:1] in ('(', '[') and body[-1:] in (')', ']'):
      body = body[1:-1]
    items = [item.strip() for item in body.split(',')]
    if items[-1] == '':  # '' and the trailing comma of '(4,)'
      items.pop()
    if any(not item for item in items):
      raise wrong
    return tuple(parse(item.strip('\'"'), inner, key) for item in items)
  if kind is str:
    return text
  if kind is bool:
    if text.lower() in _TRUE + _FALSE:
      return text.lower() in _TRUE
    raise UserError(f'--config.{key}={text}: expected true or false')
  try:
    if kind is int:
      number = int(text) if text.lstrip('+-').isdigit() else float(text)
    else:
      number = float(text)
    return convert(number, kind, key)
  except (ValueError, OverflowError, UserError):
    raise wrong from None
