"""What a step carries, and how parameters split into trained and frozen."""

import re
from typing import Any

import flax
import jax

from refrag_jax.sharding import path_str


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # int32, optimizer-independent: batches consumed
  params: dict
  opt_state: Any  # of the trainable parameters only


def partition(params: dict, regex: str, freeze: str = '') -> tuple[dict, dict]:
  """Splits params into (trainable, frozen) by path; absent leaves are None.

  Trainable is what `regex` finds and `freeze`, where there is one, does not.

  Frozen leaves so get no gradient, no optimizer moment and no share in the
  gradient norm, and stay bitwise what they were.
  """

  def trains(path):
    kept = freeze and re.search(freeze, path_str(path))
    return bool(re.search(regex, path_str(path))) and not kept

  def keep(wanted):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x if trains(path) == wanted else None, params
    )

  return keep(True), keep(False)


def merge(trainable: dict, frozen: dict) -> dict:
  """The inverse of `partition`."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    trainable,
    frozen,
    is_leaf=lambda x: x is None,
  )


def count(params: dict) -> int:
  return sum(x.size for x in jax.tree.leaves(params))
