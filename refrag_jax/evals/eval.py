"""What an eval is: its numbers, what it needs, and its table in the report."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError


def no_check(config: Config) -> None:
  """The `check` of evals that need no more than their lists filled."""
  del config


class Eval(NamedTuple):
  """One eval; evaluate.py runs any of them, report.html shows any of them."""

  run: Callable[[Any], dict]  # Context -> data set -> row -> column -> STAT
  title: str  # of its part of report.html
  table: Callable[[Mapping[str, Any]], str]  # what `run` gave -> HTML
  needs: tuple[str, ...] = ()  # lists of config.eval that must not be empty
  # The stage whose section says how long its contexts are.
  stage: str = ''
  # config -> (context, output) tokens of the windows that it cuts from held-out
  # text; None: it reads any text, or none.
  windows: Callable[[Config], tuple[int, int]] | None = None
  check: Callable[[Config], None] = no_check
  reads: str = 'text'  # or 'questions': measured once, whatever texts there are


def check_eval(name: str, of: Eval, config: Config) -> None:
  """Refuses a config that an eval cannot work with.

  Raises:
    UserError: in one line, what to change.
  """
  if of.stage and of.stage not in config.stage:
    raise UserError(
      f'config.evals names {name}, whose windows are those of '
      f'config.stage.{of.stage}, which is missing: add it to the config file, '
      'or take the eval out'
    )
  for field in of.needs:
    if not getattr(config.eval, field):
      raise UserError(
        f'config.eval.{field} is empty: the eval {name!r} needs at least one'
      )
  of.check(config)


def check_multiples(config: Config, field: str) -> None:
  """Refuses lengths that are no whole number of chunks."""
  values, k = getattr(config.eval, field), config.model.chunk_size
  if any(n % k for n in values):
    raise UserError(
      f'config.eval.{field} {values}: each must be a multiple of '
      f'config.model.chunk_size {k}'
    )


def continued(stage: str) -> Callable[[Config], tuple[int, int]]:
  """Windows of a stage's context and the longest of eval.output_lengths."""
  return lambda config: (
    config.stage[stage].context_length,
    max(config.eval.output_lengths),
  )


def regenerated(config: Config) -> tuple[int, int]:
  """Windows whose context is their output."""
  return 0, max(config.eval.reconstruct_lengths)


def check_regenerated(config: Config) -> None:
  """Refuses lengths beyond what the stages that regenerate have seen."""
  lengths = config.eval.reconstruct_lengths
  for name in ('reconstruct', 'reconstruct_unfrozen'):
    if name in config.stage:
      longest = config.stage[name].context_length
      if max(lengths) > longest:
        raise UserError(
          f'config.eval.reconstruct_lengths {lengths}: '
          f'config.stage.{name}.context_length has only {longest} tokens'
        )
  check_multiples(config, 'reconstruct_lengths')
