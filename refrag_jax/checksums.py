"""A number for every array that changes with any of its bits, on any mesh.

Each element is mixed with its place and the results are added up, so that the
devices of a mesh add up their own parts and no element travels. One element
that differs is always noticed; of several, one case in 2^32 is not.

Dimension key: R rows, C columns: an array as a matrix, its last axes merged.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# XLA's CPU compiler adds up a whole array one integer at a time. Blocks of so
# many elements are added to each other element by element, with vector
# instructions and within the cache, four to a turn of the loop to store the
# sums less often: 8 times as fast (256 MiB, two cores), nearly what reading the
# memory takes.
CPU_BLOCK = 1 << 15
UNROLL = 4
COLUMNS = 512  # or more, where the array has them
ODD = 0x9E3779B1  # 2^32 over the golden ratio
UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes an element


def checksums(params: Any) -> Any:
  """A NumPy uint32 per leaf, computed where the leaves lie."""
  leaves, tree = jax.tree.flatten(params)
  if not leaves:
    return params
  shardings = tuple(getattr(x, 'sharding', None) for x in leaves)
  return jax.tree.unflatten(tree, jax.device_get(_of_leaves(leaves, shardings)))


@functools.partial(jax.jit, static_argnums=1)
def _of_leaves(leaves: list, shardings: tuple) -> jax.Array:
  # In one array, which comes to the host in one piece. Leaves that are alike,
  # as parameters and their moments are, are traced once.
  return jnp.stack([_of_leaf(x, y) for x, y in zip(leaves, shardings)])


@functools.partial(jax.jit, static_argnums=1)
def _of_leaf(x: jax.Array, sharding: Any) -> jax.Array:
  if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
    return _sum(x, [0] * x.ndim)
  spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
  names = [(name,) if isinstance(name, str) else name or () for name in spec]

  def of_part(part):
    starts = [
      jax.lax.axis_index(axes) * size if axes else 0
      for axes, size in zip(names, part.shape)
    ]
    return jax.lax.psum(_sum(part, starts), sum(names, ()))

  return jax.shard_map(
    of_part, mesh=sharding.mesh, in_specs=sharding.spec,
    out_specs=PartitionSpec(), check_vma=False,
  )(x)  # fmt: skip


def _sum(x: jax.Array, starts: list) -> jax.Array:
  """Of a part of an array whose first element has the index `starts`."""
  split = x.ndim  # of the axes that make rows from those that make columns
  while split and math.prod(x.shape[split:]) < COLUMNS:
    split -= 1
  rows, columns = math.prod(x.shape[:split]), math.prod(x.shape[split:])
  place_R, place_C = (
    _places(x.shape, starts, axes)
    for axes in (range(split), range(split, x.ndim))
  )
  x_RC = x.reshape(rows, columns)

  def mixed(start, size):
    part_RC = jax.lax.dynamic_slice_in_dim(x_RC, start, size)
    part_R = jax.lax.dynamic_slice_in_dim(place_R, start, size)
    bits_RC = jax.lax.bitcast_convert_type(part_RC, UINTS[x.dtype.itemsize])
    return _mix(bits_RC.astype(jnp.uint32) ^ part_R[:, None] ^ place_C[None])

  size = max(1, CPU_BLOCK // max(1, columns))
  if jax.default_backend() != 'cpu' or rows < 2 * size:
    return mixed(0, rows).sum(dtype=jnp.uint32)
  blocks, rest = divmod(rows, size)
  sums_RC = jax.lax.fori_loop(
    0, blocks, lambda i, sums_RC: sums_RC + mixed(i * size, size),
    jnp.zeros((size, columns), jnp.uint32), unroll=UNROLL,
  )  # fmt: skip
  last_RC = mixed(blocks * size, rest)
  return sums_RC.sum(dtype=jnp.uint32) + last_RC.sum(dtype=jnp.uint32)


def _places(shape: tuple, starts: list, axes: range) -> jax.Array:
  """uint32 for each index of these axes, in one axis."""
  places = jnp.zeros((1,) * len(axes), jnp.uint32)
  for i, axis in enumerate(axes):
    index = jnp.uint32(starts[axis]) + jnp.arange(shape[axis], dtype=jnp.uint32)
    # Mixed, and of each axis another way: multiples of one number would give
    # many elements the same place.
    mixed = _mix(index + jnp.uint32(ODD * (axis + 1) % 2**32))
    places ^= mixed.reshape(
      tuple(-1 if j == i else 1 for j in range(len(axes)))
    )
  return places.reshape(-1)


def _mix(x: jax.Array) -> jax.Array:
  """One to one, each bit depending on all (lowbias32 of hash-prospector)."""
  x ^= x >> 16
  x *= jnp.uint32(0x7FEB352D)
  x ^= x >> 15
  x *= jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
