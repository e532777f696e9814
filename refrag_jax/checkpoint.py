"""Checkpoints; the only file that imports Orbax.

A stage's directory holds numbered steps, the newest and the best by held-out
loss. Each step has three items: `params` (all groups, as nested dicts; of an
imported model those that came in, and then no `opt_state`),
`opt_state` (flat, by path: optax's tuples are no interchange format) and `meta`
(JSON: what it is, and everything else that a resumed run needs). A directory
appears whole, by rename; saving is asynchronous.
"""

import logging
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from refrag_jax.errors import UserError
from refrag_jax.sharding import path_str
from refrag_jax.state import TrainState

FORMAT = 4
logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax narrates each save


def open_manager(directory: str) -> ocp.CheckpointManager:
  """A manager that keeps the newest step and the one with the least loss.

  `best_fn` with `max_to_keep` alone would delete the newest.
  """
  best = preservation_policy.BestN(
    get_metric_fn=lambda metrics: metrics['loss'], reverse=True, n=1
  )
  keep = preservation_policy.AnyPreservationPolicy(
    [preservation_policy.LatestN(1), best]
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=keep, enable_async_checkpointing=True
  )
  return ocp.CheckpointManager(
    os.path.abspath(directory),
    options=options,
    item_names=('params', 'opt_state', 'meta'),
  )


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  meta: dict[str, Any],
  heldout_loss: float,
) -> None:
  """Starts saving; an error of an earlier save surfaces here."""
  manager.check_for_errors()
  items = {
    'params': ocp.args.StandardSave(state.params),
    'meta': ocp.args.JsonSave(meta | {'format': FORMAT, 'step': step}),
  }
  if opt_state := _flat(state.opt_state):  # an imported model has none
    items['opt_state'] = ocp.args.StandardSave(opt_state)
  manager.save(
    step,
    args=ocp.args.Composite(**items),
    metrics={'loss': float(heldout_loss)},
  )


def restore(
  manager: ocp.CheckpointManager, step: int, abstract: TrainState
) -> TrainState:
  """The whole state of a step, in the shardings of `abstract`."""
  items = manager.restore(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardRestore(abstract.params),
      opt_state=ocp.args.StandardRestore(_flat(abstract.opt_state)),
    ),
  )
  leaves = [
    items['opt_state'][path_str(path)]
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
  ]
  opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)
  count = jax.device_put(np.int32(step), abstract.step.sharding)
  return TrainState(step=count, params=items['params'], opt_state=opt_state)


def read_meta(directory: str, step: int | None = None) -> dict[str, Any] | None:
  """The `meta` of a step (default: the newest); None if there is none."""
  step = latest_step(directory) if step is None else step
  if step is None:
    return None
  with _reader(directory) as manager:
    items = manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )
  return items['meta']


def latest_step(directory: str) -> int | None:
  if not os.path.isdir(directory):
    return None
  with _reader(directory) as manager:
    return manager.latest_step()


def load_params(directory: str, abstract_params: dict) -> dict:
  """The parameters of the newest step, onto whatever mesh `abstract` says.

  Args:
    abstract_params: the groups wanted; others in there are not read.
  """
  restore = ocp.args.PyTreeRestore(
    abstract_params,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_params),
    partial_restore=True,
  )
  with _reader(directory) as manager:
    items = manager.restore(
      manager.latest_step(), args=ocp.args.Composite(params=restore)
    )
  return items['params']


def require(
  directory: str, expected: dict[str, Any], why: str
) -> dict[str, Any]:
  """The meta of a finished checkpoint that fits, or a UserError that says why.

  Args:
    directory: a stage's checkpoint directory.
    expected: what of `model` and `tokenizers`, as written by train.py, the
      reader relies on.
    why: starts the sentence, e.g. "stage 'cpt' starts from 'reconstruct'".
  """
  meta = read_meta(directory)
  if meta is None:
    raise UserError(f'{why}, but there is no checkpoint in {directory}')
  if meta.get('format') != FORMAT:
    raise UserError(
      f'{why}, but {directory} has checkpoint format {meta.get("format")}, '
      f'this version reads {FORMAT}'
    )
  differences = [
    f'{name} is {old!r} there and {new!r} here'
    for name, old, new in _differences(meta, expected)
  ]
  if differences:
    shown = '; '.join(differences[:4])
    raise UserError(
      f'{why}, but the checkpoint in {directory} does not fit this config: '
      f'{shown}; use its config, or another --workdir'
    )
  return meta


def _reader(directory: str) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    os.path.abspath(directory),
    options=ocp.CheckpointManagerOptions(read_only=True),
    item_names=('params', 'opt_state', 'meta'),
  )


def _flat(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_str(path): leaf for path, leaf in leaves}


def _differences(old: Any, new: Any, name: str = ''):
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(new):
      inner = f'{name}.{key}' if name else key
      yield from _differences(old.get(key), new[key], inner)
  elif old != new:
    yield name, old, new
