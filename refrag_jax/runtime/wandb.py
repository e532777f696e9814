"""Weights & Biases, for who has it: the same numbers as metrics.jsonl."""

from collections.abc import Mapping
from typing import Any

from refrag_jax.errors import UserError


def require() -> Any:
  """The package.

  Raises:
    UserError: it is not installed.
  """
  try:
    import wandb
  except ImportError as e:
    raise UserError(
      "config.wandb needs the package wandb: pip install wandb, or set it to ''"
    ) from e
  return wandb


class Board:
  """One run of a project; a workdir that is resumed goes on with its own."""

  def __init__(self, project: str, workdir: str):
    name = workdir.rstrip('/').replace('/', '-')
    self._run = require().init(
      project=project, id=name, name=name, dir=workdir, resume='allow'
    )

  def scalars(
    self, stage: str, step: int, split: str, values: Mapping[str, Any]
  ) -> None:
    """The numbers of a step; each stage counts its own steps."""
    numbers = {
      f'{stage}/{split}/{key}': value
      for key, value in values.items()
      if isinstance(value, (int, float))
    }
    self._run.log(numbers | {f'{stage}/step': step})

  def close(self) -> None:
    self._run.finish()
