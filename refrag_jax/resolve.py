"""A checked config: what stages and evals need of it included.

The command line reads a config before JAX may be imported (config/load.py);
what checks stages and evals comes after.
"""

from collections.abc import Sequence
from typing import Any

from refrag_jax import evals, stages
from refrag_jax.config import load
from refrag_jax.config.schema import Config


def check(config: Config) -> Config:
  """The config, if its stages and evals can work.

  Raises:
    UserError: one line that says what to do.
  """
  stages.check(config)
  evals.check(config)
  return config


def build(values: Any) -> Config:
  """`load.build`, checked."""
  return check(load.build(values))


def changed(config: Config, changes: Sequence[str]) -> Config:
  """`load.changed`, checked."""
  return check(load.changed(config, changes))
