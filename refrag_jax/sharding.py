"""The only place that knows mesh axes: two tables and four functions.

PARAM_AXES names the logical axes of every parameter by its path; AXIS_RULES
says on which mesh axes each logical axis lies. Models speak logical axes only
(`constrain(hidden_BTD, 'batch', None, None)`), so another layout is an edit of
one table. Optimizer moments carry their parameter's path, hence its layout.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from refrag_jax.errors import UserError

MESH_AXES = ('data', 'fsdp', 'tensor')

# First match wins; right-aligned, so that a scanned layer axis stays whole.
PARAM_AXES = (
  (r'embed_tokens$', ('vocab', 'embed')),
  (r'lm_head$', ('embed', 'vocab')),
  (r'word_embeddings$', ('vocab', 'embed')),
  (r'position_embeddings$', (None, 'embed')),
  (r'[qkv]_proj/kernel$', ('embed', 'heads', None)),
  (r'[qkv]_proj/bias$', ('heads', None)),
  (r'o_proj/kernel$', ('heads', None, 'embed')),
  (r'(gate|up)_proj/kernel$', ('embed', 'mlp')),
  (r'(gate|up)_proj/bias$', ('mlp',)),
  (r'down_proj/kernel$', ('mlp', 'embed')),
  (r'(o|down)_proj/bias$', (None,)),
  (r'score/kernel$', (None, None)),
  (r'norm(/scale|/bias)?$', (None,)),
)

AXIS_RULES = {
  'batch': ('data', 'fsdp'),
  'embed': 'fsdp',
  'heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
}


def make_mesh(
  data: int, fsdp: int, tensor: int, devices=None
) -> jax.sharding.Mesh:
  """Builds the mesh, with Auto axes: XLA decides what no rule says.

  Args:
    data: replicas; -1 takes the devices that the other axes leave.
    fsdp: ways to shard parameters and batch.
    tensor: ways to shard heads, MLP and vocabulary.
    devices: None takes all that there are.

  Raises:
    UserError: the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  number = len(devices)
  if data == -1:
    data = max(1, number // (fsdp * tensor))
  if data * fsdp * tensor != number:
    raise UserError(
      f'mesh data={data} x fsdp={fsdp} x tensor={tensor} is not the '
      f'{number} devices there are; set --config.mesh.data=-1 to fill up'
    )
  shape = (data, fsdp, tensor)
  try:
    placed = mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:
    # A TPU's torus has no such axes (8 x 8 on 4 x 4 x 4): then one of ours
    # takes a part of one of its.
    placed = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return jax.sharding.Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def path_str(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def to_spec(axes, shape=None, mesh=None) -> PartitionSpec:
  """Logical axes to a PartitionSpec; an axis that does not divide is whole."""
  spec = [AXIS_RULES.get(axis) for axis in axes]
  if shape is not None:
    for i, names in enumerate(spec):
      names = (names,) if isinstance(names, str) else names or ()
      if shape[i] % int(np.prod([mesh.shape[name] for name in names])):
        spec[i] = None
  return PartitionSpec(*spec)


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
  """The logical axes of the parameter (or its Adam moment) at path `name`."""
  if ndim == 0:
    return ()
  for regex, axes in PARAM_AXES:
    if re.search(regex, name):
      return (None,) * (ndim - len(axes)) + axes
  raise ValueError(f'no rule in PARAM_AXES matches parameter {name!r}')


def infer_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings for a TrainState of arrays or ShapeDtypeStructs."""

  def infer(path, x):
    axes = logical_axes(path_str(path), x.ndim)
    return NamedSharding(mesh, to_spec(axes, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(infer, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(AXIS_RULES['batch']))


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The same whole arrays on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(x: jax.Array) -> np.ndarray:
  """The whole array on every host; all of them have to ask for it."""
  if not (x.is_fully_addressable or x.is_fully_replicated):
    whole = NamedSharding(x.sharding.mesh, PartitionSpec())
    x = jax.jit(lambda x: x, out_shardings=whole)(x)
  return np.asarray(x)


class StopVote:
  """Whether any process was asked to stop; all get the same answer.

  A signal reaches the processes at different steps, and one that stops alone
  leaves the others waiting for it. So each one says at every step whether it
  was asked, and hears one call later, without waiting, whether anybody was.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh, self._before = mesh, None
    self._each = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    whole = NamedSharding(mesh, PartitionSpec())
    self._any = jax.jit(lambda asked: asked.any(), out_shardings=whole)

  def __call__(self, asked: bool) -> bool:
    """Of one process its own answer at once."""
    if jax.process_count() == 1:
      return asked
    answer = self._before is not None and bool(self._before)
    mine = np.full(len(self._mesh.local_devices), asked)
    self._before = self._any(
      jax.make_array_from_process_local_data(self._each, mine)
    )
    return answer


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's layout by logical axes; no-op outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, to_spec(axes, x.shape, mesh))
