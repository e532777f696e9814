"""The only place that knows mesh axes: two tables, and what follows from them.

PARAM_AXES names the logical axes of every parameter by its path; AXIS_RULES
says on which mesh axes each logical axis lies. Models speak logical axes only
(`constrain(hidden_BTD, 'batch', None, None)`), so another layout is an edit of
one table. Optimizer moments carry their parameter's path, hence its layout.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from refrag_jax.errors import UserError

MESH_AXES = ('data', 'fsdp', 'tensor', 'sequence')

# First match wins; right-aligned, so that a scanned layer axis stays whole.
PARAM_AXES = (
  (r'embed_tokens$', ('vocab', 'embed')),
  (r'lm_head$', ('embed', 'vocab')),
  (r'word_embeddings$', ('vocab', 'embed')),
  (r'position_embeddings$', (None, 'embed')),
  # Adapters, divided as the kernels that they change; their rank is small.
  (r'o_proj/a/kernel$', ('heads', None, None)),
  (r'down_proj/a/kernel$', ('mlp', None)),
  (r'_proj/a/kernel$', ('embed', None)),
  (r'[qkv]_proj/b/kernel$', (None, 'heads', None)),
  (r'(gate|up)_proj/b/kernel$', (None, 'mlp')),
  (r'_proj/b/kernel$', (None, 'embed')),
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
  # Chunks to encode, of all rows in one axis: each device that shares rows
  # takes a part of their chunks.
  'chunks': ('data', 'fsdp', 'sequence'),
  'sequence': ('sequence',),
  # Every device of a row holds a part of the parameters.
  'embed': ('fsdp', 'sequence'),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
}


def make_mesh(
  data: int, fsdp: int, tensor: int, sequence: int = 1, devices=None
) -> jax.sharding.Mesh:
  """Builds the mesh, with Auto axes: XLA decides what no rule says.

  Args:
    data: replicas.
    fsdp: ways to shard parameters and batch.
    tensor: ways to shard heads, MLP and vocabulary.
    sequence: ways to shard the positions of a row, and parameters.
      One of these may be -1: it takes the devices that the others leave.
    devices: None takes all that there are.

  Raises:
    UserError: the product is not the number of devices, or other axes than
      data would lie across TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = fill_up((data, fsdp, tensor, sequence), len(devices))
  placed = _placed(shape, list(devices))
  return jax.sharding.Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def _placed(shape: tuple[int, ...], devices: list) -> np.ndarray:
  """The devices in the mesh's shape, near ones along the inner axes."""
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  make = functools.partial(mesh_utils.create_device_mesh, shape)
  if slices > 1 and devices[0].platform == 'tpu':
    # Slices reach each other by the slow network: only data lies across it.
    if shape[0] % slices:
      raise UserError(
        f'mesh data={shape[0]} does not divide over the {slices} slices that '
        f'there are, and no other axis should: set --config.mesh.data={slices} '
        'or a multiple of it'
      )
    within = (shape[0] // slices, *shape[1:])
    across = (slices,) + (1,) * len(within[1:])
    make = functools.partial(
      mesh_utils.create_hybrid_device_mesh, within, across
    )
  try:
    return make(devices)
  except NotImplementedError:
    # A TPU's torus has no such axes (8 x 8 on 4 x 4 x 4): then one of ours
    # takes a part of one of its.
    return make(devices, allow_split_physical_axes=True)


def fill_up(shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
  """A mesh's shape without its -1.

  Raises:
    UserError: no such mesh has that many devices; the message has one that has.
  """
  rest, free = math.prod(size for size in shape if size != -1), -1 in shape
  filled = tuple(max(1, devices // rest) if n == -1 else n for n in shape)
  if math.prod(filled) == devices:
    return filled
  # The inner axes as they are where they divide, the rest to the first.
  fits = []
  for size in reversed(filled[1:]):
    left = devices // math.prod(fits)
    fits.insert(0, max(n for n in range(1, size + 1) if left % n == 0))
  fits.insert(0, devices // math.prod(fits))
  asked, better = (
    ' x '.join(f'{name}={n}' for name, n in zip(MESH_AXES, sizes))
    for sizes in (shape, fits)
  )
  hint = '' if free else ' (--config.mesh.data=-1 takes what the others leave)'
  raise UserError(
    f'mesh {asked} is not the {devices} devices there are; {better} would '
    f'be{hint}'
  )


def path_str(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def to_spec(axes, shape=None, mesh=None) -> PartitionSpec:
  """Logical axes to a PartitionSpec.

  Of the mesh axes that a rule names, the last ones are left out until the rest
  divides the dimension.
  """
  spec = []
  for i, axis in enumerate(axes):
    names = AXIS_RULES.get(axis, ())
    while shape is not None and shape[i] % _size(names, mesh):
      names = names[:-1]
    spec.append(names[0] if len(names) == 1 else names or None)
  return PartitionSpec(*spec)


def _size(names: tuple[str, ...], mesh) -> int:
  return math.prod(mesh.shape[name] for name in names)


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


def layout(tree: Any) -> str:
  """A line for each array with a sharding: path, shape, mesh axes of each axis.

  Args:
    tree: of arrays or ShapeDtypeStructs.
  """
  lines = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    shape = ' x '.join(map(str, x.shape))
    lines.append(f'{path_str(path)}  [{shape}]  {describe(x.sharding.spec)}\n')
  return ''.join(lines)


def describe(spec: PartitionSpec) -> str:
  """A PartitionSpec for people: 'fsdp+sequence, tensor, -'."""
  names = [(axis,) if isinstance(axis, str) else axis or '-' for axis in spec]
  return ', '.join('+'.join(axes) for axes in names)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, to_spec(('batch',)))


def local_rows(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
  """Which of a batch's rows this process's devices hold, int, ascending.

  Where other axes than those of the batch lie across processes, several of
  them hold the same rows.
  """
  where = batch_sharding(mesh).addressable_devices_indices_map((rows,))
  return np.unique(
    np.concatenate([np.arange(rows)[index] for index in where.values()])
  )


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The same whole arrays on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(x: jax.Array) -> np.ndarray:
  """The whole array on every host; all of them have to ask for it."""
  if not (x.is_fully_addressable or x.is_fully_replicated):
    whole = NamedSharding(x.sharding.mesh, PartitionSpec())
    x = jax.jit(lambda x: x, out_shardings=whole)(x)
  return np.asarray(x)


def any_process(value: bool) -> bool:
  """Whether it is true on any process; waits for all of them."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.array(value)).any())


class Vote:
  """Whether any process says yes; all get the same answers.

  A signal reaches the processes at different steps, and one that stops alone
  leaves the others waiting for it. So each one says at every step whether it
  was asked, and hears one call later, without waiting, whether anybody was.
  Clocks differ as well: what is due by the time is put to the vote too.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh, self._before = mesh, None
    self._each = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    whole = NamedSharding(mesh, PartitionSpec())
    self._any = jax.jit(lambda said: said.any(0), out_shardings=whole)

  def __call__(self, *said: bool) -> tuple[bool, ...]:
    """An answer to each question; of one process its own at once."""
    if jax.process_count() == 1:
      return said
    before, devices = self._before, len(self._mesh.local_devices)
    answer = (False,) * len(said) if before is None else before
    mine = np.tile(np.array(said), (devices, 1))
    self._before = self._any(
      jax.make_array_from_process_local_data(self._each, mine)
    )
    return tuple(map(bool, np.asarray(answer)))

  def now(self, *said: bool) -> tuple[bool, ...]:
    """The answers to these questions themselves, waited for."""
    self(*said)
    return self(*said)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's layout by logical axes; no-op outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, to_spec(axes, x.shape, mesh))


def axis_size(axis: str, mesh: jax.sharding.Mesh | None = None) -> int:
  """Ways in which a mesh, or the one in use, divides a logical axis.

  1 outside a mesh.
  """
  mesh = mesh or jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _size(AXIS_RULES[axis], mesh)


def per_device(f: Callable, in_axes: Any, out_axes: tuple) -> Callable:
  """`f` on each device's part of its arguments; outside a mesh `f` itself.

  For what XLA does not divide as we would. The gradient of an argument that
  several devices read is summed over them.

  Args:
    in_axes: logical axes of each argument; of each leaf, for a tuple of arrays.
    out_axes: those of the result, whose shape is that of the first argument.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f

  def call(*args):
    spec = lambda x, axes: to_spec(axes, x.shape, mesh)
    return jax.shard_map(
      f,
      in_specs=jax.tree.map(spec, args, in_axes),
      out_specs=spec(args[0], out_axes),
      check_vma=False,
    )(*args)

  return call
