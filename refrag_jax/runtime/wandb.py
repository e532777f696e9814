"""Weights & Biases, for who has it: the same numbers as metrics.jsonl."""

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from refrag_jax.errors import UserError
from refrag_jax.runtime import files


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
  """One run of a project; a workdir that is resumed goes on with its own.

  What is logged there cannot be taken back: where a stage is resumed, the steps
  behind its checkpoint stand there twice, at the same place of the axis.
  """

  def __init__(self, project: str, workdir: str, config: Mapping[str, Any]):
    """Starts the run, or goes on with that of the workdir.

    Raises:
      UserError: the package is missing, or cannot start (nobody is logged in).
    """
    self._package, self._stages = require(), set()
    try:
      self._run = self._package.init(
        project=project,
        id=_run_id(workdir),
        name=workdir.strip('/').replace('/', '-'),
        config=dict(config),
        dir=workdir,
        resume='allow',
      )
    except self._package.Error as e:
      said = ' '.join(str(e).split())
      raise UserError(
        f'config.wandb is {project!r}, but Weights & Biases does not start: '
        f'{said}; set WANDB_MODE=offline to send nothing'
      ) from e

  def scalars(
    self, stage: str, step: int, split: str, values: Mapping[str, Any]
  ) -> None:
    """The numbers of a step; each stage counts its own steps."""
    numbers = {
      f'{split}/{key}': value
      for key, value in values.items()
      if isinstance(value, (int, float))
    }
    self._log(stage, step, numbers)

  def samples(
    self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    """A table of texts; of each row the columns that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    data = [[str(row.get(name, '')) for name in columns] for row in rows]
    table = self._package.Table(columns=columns, data=data)
    self._log(stage, step, {'samples': table})

  def close(self) -> None:
    self._run.finish()

  def _log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
    axis = f'{stage}/step'
    if stage not in self._stages:
      self._run.define_metric(f'{stage}/*', step_metric=axis)
      self._stages.add(stage)
    named = {f'{stage}/{key}': value for key, value in values.items()}
    self._run.log(named | {axis: step})


def _run_id(workdir: str) -> str:
  """The workdir's own, drawn once: a path may be taken again, or elsewhere."""
  path = os.path.join(workdir, 'wandb_id.txt')
  if not os.path.exists(path):
    files.write_text(path, uuid.uuid4().hex[:12] + '\n')
  with open(path, encoding='utf-8') as f:
    return f.read().strip()
