"""Docstrings and signatures of the standard library.

Source files are parsed, not imported: quick and without side effects. A few C
modules, which have no source here, are asked through `inspect`.
"""

import ast
import importlib
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

# Without prose of their own: tests, applications, generated tables, and code
# that is not the standard library's.
SKIPPED_DIRECTORIES = (
  '__pycache__', 'dist-packages', 'encodings', 'ensurepip', 'idlelib',
  'lib-dynload', 'lib2to3', 'pydoc_data', 'site-packages', 'test', 'tests',
  'turtledemo',
)  # fmt: skip

# Importing these does nothing that could be noticed.
C_MODULES = ('builtins', 'gc', 'itertools', 'math', 'sys', 'time')


class Entry(NamedTuple):
  """One documented object, or (with an empty `qualname`) a module itself.

  Parameters are (as displayed, default or ''), without annotations and without
  a bound `self`; None where no signature is known. The first `positional` of
  them take a position.
  """

  module: str
  qualname: str
  parameters: tuple[tuple[str, str], ...] | None
  positional: int
  doc: str

  @property
  def signature(self) -> str:
    if self.parameters is None:
      return self.qualname
    shown = ', '.join(shown for shown, _ in self.parameters)
    return f'{self.qualname}({shown})'


def modules() -> Iterator[tuple[str, list[Entry]]]:
  """(dotted name, documented objects) of every module that has some."""
  for name in C_MODULES:
    entries = _c_entries(name)
    if entries:
      yield name, entries
  root = os.path.dirname(os.__file__)
  for directory, subdirectories, files in os.walk(root):
    subdirectories[:] = sorted(
      name
      for name in subdirectories
      if name not in SKIPPED_DIRECTORIES and not name.startswith('config-')
    )
    for file in sorted(files):
      if file.endswith('.py') and not file.startswith('_sysconfigdata'):
        path = os.path.join(directory, file)
        parts = os.path.relpath(path, root)[:-3].split(os.sep)
        name = '.'.join(part for part in parts if part != '__init__')
        entries = _source_entries(name, path)
        if entries:
          yield name, entries


def _source_entries(module: str, path: str) -> list[Entry]:
  with open(path, 'rb') as file, warnings.catch_warnings():
    warnings.simplefilter('ignore')  # the library's own invalid escapes
    try:
      tree = ast.parse(file.read())
    except (SyntaxError, ValueError):  # a distribution's template, never ours
      return []
  entries = []
  doc = ast.get_docstring(tree)
  if doc:
    entries.append(Entry(module, '', None, 0, doc))
  _visit(module, '', tree, entries)
  return entries


def _visit(module: str, prefix: str, parent, entries: list[Entry]) -> None:
  """Adds the documented classes and functions below `parent`, in order."""
  for node in parent.body:
    if isinstance(node, ast.ClassDef):
      qualname = f'{prefix}{node.name}'
      doc = ast.get_docstring(node)
      if doc:
        init = next(
          (
            child
            for child in node.body
            if isinstance(child, ast.FunctionDef) and child.name == '__init__'
          ),
          None,
        )
        parameters, positional = (
          _parameters(init.args, True) if init else (None, 0)
        )
        entries.append(Entry(module, qualname, parameters, positional, doc))
      _visit(module, f'{qualname}.', node, entries)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      doc = ast.get_docstring(node)
      decorators = {
        ast.unparse(decorator).rpartition('.')[2]
        for decorator in node.decorator_list
      }
      if not doc or decorators & {'overload', 'setter', 'deleter'}:
        continue
      bound = bool(prefix) and 'staticmethod' not in decorators
      parameters, positional = _parameters(node.args, bound)
      if decorators & {'property', 'cached_property'}:
        parameters, positional = None, 0
      entries.append(
        Entry(module, f'{prefix}{node.name}', parameters, positional, doc)
      )
    elif isinstance(node, (ast.If, ast.Try)):
      _visit(module, prefix, node, entries)


def _parameters(arguments: ast.arguments, bound: bool):
  """`parameters` and `positional` of an `Entry`."""
  plain = [*arguments.posonlyargs, *arguments.args]
  defaults = [None] * (len(plain) - len(arguments.defaults))
  pairs = list(zip(plain, [*defaults, *arguments.defaults]))
  if bound:
    pairs = pairs[1:]
  shown = [_shown(argument.arg, default) for argument, default in pairs]
  positional = len(shown)
  if arguments.vararg:
    shown.append((f'*{arguments.vararg.arg}', ''))
  elif arguments.kwonlyargs:
    shown.append(('*', ''))
  for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
    shown.append(_shown(argument.arg, default))
  if arguments.kwarg:
    shown.append((f'**{arguments.kwarg.arg}', ''))
  return tuple(shown), positional


def _shown(name: str, default) -> tuple[str, str]:
  if default is None:
    return name, ''
  text = ast.unparse(default)
  return f'{name}={text}', text


def _c_entries(module: str) -> list[Entry]:
  """The same for a module written in C: functions, types and their methods."""
  namespace = vars(importlib.import_module(module))
  entries = [Entry(module, '', None, 0, inspect.cleandoc(namespace['__doc__']))]
  for name, value in sorted(namespace.items()):
    # Hooks are there to be replaced, and then would be missing here.
    if name.startswith('_') or name.endswith('hook'):
      continue
    if inspect.isbuiltin(value):
      entries += _c_entry(module, name, value, False)
    elif inspect.isclass(value) and value.__module__ == module:
      if issubclass(value, BaseException):
        continue  # 'Base class for ...', about 70 times
      entries += _c_entry(module, name, value, False)
      for attribute, method in sorted(vars(value).items()):
        if not attribute.startswith('_') and inspect.isroutine(method):
          entries += _c_entry(module, f'{name}.{attribute}', method, True)
  return entries


def _c_entry(module: str, qualname: str, value, bound: bool) -> list[Entry]:
  doc = inspect.getdoc(value)
  if not doc:
    return []
  try:
    signature = inspect.signature(value)
  except (TypeError, ValueError):  # many C functions describe it in prose only
    return [Entry(module, qualname, None, 0, doc)]
  parameters, positional = [], 0
  kinds = inspect.Parameter
  for name, parameter in signature.parameters.items():
    if bound and name in ('self', 'type', 'cls'):
      continue
    default = parameter.default
    text = '' if default is kinds.empty else repr(default)
    star = {kinds.VAR_POSITIONAL: '*', kinds.VAR_KEYWORD: '**'}
    if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
      positional += 1
    elif parameter.kind is kinds.KEYWORD_ONLY and not any(
      shown.startswith('*') for shown, _ in parameters
    ):
      parameters.append(('*', ''))
    shown = star.get(parameter.kind, '') + name
    parameters.append((f'{shown}={text}' if text else shown, text))
  return [Entry(module, qualname, tuple(parameters), positional, doc)]
