"""Checkpoints; the only file that imports Orbax.

A stage's directory holds numbered steps, the newest and the best by held-out
loss. Each step has three items: `params` (all groups, as nested dicts; of an
imported model those that came in, and then no `opt_state`),
`opt_state` (flat, by path: optax's tuples are no interchange format) and `meta`
(JSON: what it is, and everything else that a resumed run needs). A directory
appears whole, by rename; saving is asynchronous.

Neither Orbax nor a disk notices a bit that flips in a file later. So `meta`
also has a digest of every array, made from its values where they lie before
they are saved, whatever the mesh, and one of itself. Whoever restores compares:
a step that does not hold what was saved is named, and the newest sound one
before it is taken.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from refrag_jax.checksums import checksums
from refrag_jax.errors import UserError
from refrag_jax.runtime.progress import say
from refrag_jax.sharding import any_process, path_str
from refrag_jax.state import TrainState

FORMAT = 5
READABLE = (4, 5)  # 4 has no digests
DAMAGED = '.damaged'  # what the directory of such a step ends in, put aside
logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax narrates


class Damaged(Exception):
  """A step that is not whole, or not what was saved; says what of it."""


class _NewestAndBest(preservation_policy.PreservationPolicy):
  """Keeps the newest steps and the one with the least held-out loss.

  Orbax's own policies know the losses of the steps that this process saved:
  after a restart every earlier step would count as one to keep. These are read
  from the steps.
  """

  def __init__(self, directory: str, newest: int):
    self._newest = newest
    self._loss = {step: _loss(directory, step) for step in _steps(directory)}

  def should_preserve(self, checkpoints, *, context):
    del context
    for info in checkpoints:
      if info.metrics is not None:
        self._loss[info.step] = info.metrics['loss']
    steps = [info.step for info in checkpoints]
    # Of equal losses, and of steps without one, the newest.
    best = min(reversed(steps), key=lambda step: self._loss.get(step, np.inf))
    kept = {best, *sorted(steps)[-self._newest :]}
    return [step in kept for step in steps]


def open_manager(directory: str, newest: int = 1) -> ocp.CheckpointManager:
  """A manager that saves steps and keeps `newest` of them, and the best.

  What a killed save has left half-written is removed: a directory has one
  writer.
  """
  directory = os.path.abspath(directory)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=_NewestAndBest(directory, newest),
    enable_async_checkpointing=True,
    cleanup_tmp_directories=True,
  )
  return ocp.CheckpointManager(
    directory, options=options, item_names=('params', 'opt_state', 'meta')
  )


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  meta: dict[str, Any],
  heldout_loss: float,
) -> None:
  """Starts saving; an error of an earlier save surfaces here."""
  arrays = {'params': state.params}
  if 'base_decoder' in meta:  # it lies elsewhere, and stays as it is
    arrays['params'] = {
      group: x for group, x in state.params.items() if group != 'decoder'
    }
  if opt_state := flat(state.opt_state):  # an imported model has none
    arrays['opt_state'] = opt_state
  meta = meta | {
    'format': FORMAT,
    'step': step,
    'loss': float(heldout_loss),
    'digests': {item: _digests(tree) for item, tree in arrays.items()},
  }
  items = {key: ocp.args.StandardSave(tree) for key, tree in arrays.items()}
  items['meta'] = ocp.args.JsonSave(meta | {'digest': _digest(meta)})
  manager.save(
    step,
    args=ocp.args.Composite(**items),
    metrics={'loss': float(heldout_loss)},
  )


def check_saved(manager: ocp.CheckpointManager) -> None:
  """Raises what the last save has failed of; does not wait for one at work.

  A step that failed is not among the directory's, and those before it stay.
  """
  if not manager.is_saving_in_progress():
    manager.wait_until_finished()  # where the thread's error comes out


def restore(
  directory: str, abstract: TrainState
) -> tuple[int, TrainState, dict[str, Any]]:
  """The newest sound step, its state in the shardings of `abstract`, its meta.

  Steps that are found damaged on the way are put aside, so that a run that goes
  on from here can save them anew.

  Raises:
    UserError: no step is sound.
  """

  def read(step: int, meta: dict[str, Any]) -> TrainState:
    params = _read(directory, step, 'params', abstract.params, meta)
    moments = flat(abstract.opt_state)
    moments = _read(directory, step, 'opt_state', moments, meta)
    leaves = [
      moments[path_str(path)]
      for path, _ in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    ]
    count = jax.device_put(np.int32(step), abstract.step.sharding)
    opt_state = jax.tree.unflatten(
      jax.tree.structure(abstract.opt_state), leaves
    )
    return TrainState(step=count, params=params, opt_state=opt_state)

  step, state, meta = _newest_sound(directory, read)
  for later in _steps(directory):
    if later > step:
      _put_aside(os.path.join(directory, str(later)))
  return step, state, meta


def read_meta(directory: str) -> dict[str, Any] | None:
  """The `meta` of the newest step where it is sound; None if there is no step.

  Raises:
    UserError: there are steps, and the meta of none of them is sound.
  """
  if latest_step(directory) is None:
    return None
  return _newest_sound(directory, lambda step, meta: None)[2]


def latest_step(directory: str) -> int | None:
  return max(_steps(directory), default=None)


def load_params(directory: str, abstract_params: dict) -> dict:
  """The parameters of the newest sound step, onto the mesh of `abstract`.

  Args:
    abstract_params: the groups wanted; others in there are not read.

  Raises:
    UserError: no step is sound.
  """

  def read(step: int, meta: dict[str, Any]) -> dict:
    return _read(directory, step, 'params', abstract_params, meta)

  return _newest_sound(directory, read)[1]


def require(
  directory: str, expected: dict[str, Any], why: str
) -> dict[str, Any]:
  """The meta of a finished checkpoint that fits.

  Args:
    directory: a stage's checkpoint directory.
    expected: what of `model` and `tokenizers`, as written by train.py, the
      reader relies on.
    why: starts the sentence, e.g. "stage 'cpt' starts from 'reconstruct'".

  Raises:
    UserError: there is none, it is of another format, or it does not fit.
  """
  meta = read_meta(directory)
  name = os.path.basename(os.path.normpath(directory))
  if meta is None and name.isdigit() and os.path.isdir(directory):
    stage = os.path.dirname(os.path.normpath(directory))
    raise UserError(
      f'{why}, but {directory} is one step: name the directory of its stage, '
      f'{stage}, of which the newest is read'
    )
  if meta is None:
    raise UserError(f'{why}, but there is no checkpoint in {directory}')
  if meta.get('format') not in READABLE:
    raise UserError(
      f'{why}, but {directory} has checkpoint format {meta.get("format")}, '
      f'this version reads {" and ".join(map(str, READABLE))}'
    )
  # From before there were adapters.
  there = meta | {'model': {'lora': {'rank': 0}} | meta.get('model', {})}
  differences = [
    f'{name} is {old!r} there and {new!r} here'
    for name, old, new in _differences(there, expected)
  ]
  if differences:
    shown = '; '.join(differences[:4])
    raise UserError(
      f'{why}, but the checkpoint in {directory} does not fit this config: '
      f'{shown}; use its config, or another --workdir'
    )
  return meta


def _newest_sound(
  directory: str, read: Callable[[int, dict[str, Any]], Any]
) -> tuple[int, Any, dict[str, Any]]:
  """(step, what `read(step, meta)` gives, meta) of the newest sound step."""
  problem = ''
  for step in reversed(_steps(directory)):
    path, value, meta = os.path.join(directory, str(step)), None, {}
    if problem:
      say(f'{problem}; reading {path} instead')
    try:
      meta = _meta(directory, step)
      if meta.get('format') in READABLE:  # else `require` says so
        value = read(step, meta)
      found = ''
    except Damaged as e:
      found = str(e)
    # Each process reads a part of the files.
    if any_process(bool(found)):
      found = found or 'another process says how'
      problem = f'checkpoint {path} is damaged or incomplete ({found})'
      continue
    return step, value, meta
  raise UserError(f'{problem}: copy it again, or delete it')


def _read(
  directory: str, step: int, item: str, abstract: Any, meta: dict[str, Any]
) -> Any:
  """The arrays of an item, compared with their digests.

  Raises:
    Damaged: a file cannot be read, or an array is not what was saved.
  """
  path = os.path.join(os.path.abspath(directory), str(step), item)
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  args = ocp.args.PyTreeRestore(
    abstract, restore_args=restore_args, partial_restore=True
  )
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.restore(path, args=args)
  except Exception as e:  # whatever a library makes of bytes that are not its
    raise Damaged(f'{item}: {_one_line(e)}') from e
  # What a damaged list of arrays lacks comes back as it was asked for.
  for name, leaf in flat(tree).items():
    if not isinstance(leaf, jax.Array):
      raise Damaged(f'array {name} is missing in {item}/')
  wanted = meta.get('digests')
  if wanted is None:
    say(f'{path} has no digests (an older format): read without a check')
    return tree
  for name, found in _digests(tree).items():
    if found != wanted.get(item, {}).get(name):
      raise Damaged(f'array {name} in {item}/ is not what was saved')
  return tree


def _meta(directory: str, step: int) -> dict[str, Any]:
  path = os.path.join(os.path.abspath(directory), str(step), 'meta')
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      meta = reader.restore(path, args=ocp.args.JsonRestore())
  except Exception as e:
    raise Damaged(f'meta: {_one_line(e)}') from e
  if not isinstance(meta, dict) or 'format' not in meta:
    raise Damaged('meta has no format number')
  digest = meta.pop('digest', None)
  # Also where there is a digest and the format says that there is none: it
  # may be the format in which a bit has flipped.
  if (digest or meta['format'] != 4) and digest != _digest(meta):
    raise Damaged('meta is not what was saved')
  return meta


def _loss(directory: str, step: int) -> float:
  """Held-out loss of a step; infinite where that is not known (format 4)."""
  try:
    return _meta(directory, step).get('loss', np.inf)
  except Damaged:
    return np.inf


def _steps(directory: str) -> list[int]:
  """The steps on disk, ascending; half-written ones have other names."""
  try:
    names = os.listdir(directory)
  except FileNotFoundError:
    return []
  return sorted(int(name) for name in names if name.isdigit())


def _put_aside(path: str) -> None:
  """Renames a damaged step, once for all processes.

  One that lies there from an earlier time goes: a step is kept once.
  """
  if jax.process_index() == 0:
    shutil.rmtree(path + DAMAGED, ignore_errors=True)
    os.rename(path, path + DAMAGED)
    say(f'{path} is now {path}{DAMAGED}: delete it when you have looked at it')
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'put aside {path}')


def _digests(tree: Any) -> dict[str, int]:
  """Path: digest of each array, the same on any mesh."""
  return {path: int(x) for path, x in flat(checksums(tree)).items()}


def _digest(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def digest(tree: Any) -> str:
  """One for all arrays of a tree, the same on any mesh."""
  return _digest(_digests(tree))


def flat(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_str(path): leaf for path, leaf in leaves}


def _differences(old: Any, new: Any, name: str = ''):
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(new):
      inner = f'{name}.{key}' if name else key
      yield from _differences(old.get(key), new[key], inner)
  elif old != new:
    yield name, old, new
