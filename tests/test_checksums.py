"""Checksums: any bit, any mesh, any block."""

import jax
import numpy as np
import pytest
import toy

from refrag_jax import checksums as checksums_lib
from refrag_jax import sharding
from refrag_jax.checksums import checksums


def test_a_bit_is_seen_and_no_layout():
  params = toy.params()['encoder']
  there = checksums(params)
  mesh = sharding.make_mesh(1, 4, 2)
  laid = jax.device_put(params, sharding.infer_shardings(params, mesh))
  assert checksums(laid) == there
  one = jax.tree.map(np.array, params)
  kernel = one['layers']['q_proj']['kernel']
  bits = kernel.reshape(-1).view(np.uint32)
  for place in range(0, bits.size, 7):
    for bit in (0, 31):  # of the mantissa, and the sign
      bits[place] ^= np.uint32(1 << bit)
      changed = checksums({'x': kernel})['x']
      assert changed != there['layers']['q_proj']['kernel']
      bits[place] ^= np.uint32(1 << bit)
  # Two elements that trade places are a change as well.
  swapped = kernel.copy()
  swapped[0, 0, 0, :2] = kernel[0, 0, 0, 1::-1]
  assert checksums({'x': swapped})['x'] != checksums({'x': kernel})['x']
  assert {x.dtype for x in jax.tree.leaves(there)} == {np.dtype(np.uint32)}


SHAPES = {
  (): 'float32',
  (0, 4): 'float32',
  (5,): 'int32',
  (100, 3): 'bfloat16',
  (3, 70, 2, 8): 'float32',
  (9, 40, 600): 'float32',
  (600, 1000): 'bfloat16',
  (2, 200_000): 'float32',
}


@pytest.mark.parametrize('shape', SHAPES)
def test_blocks_are_only_a_way_to_add_up(shape, monkeypatch):
  """Rows that do not fill a block, arrays of no rows or of one alone."""
  x = jax.random.normal(jax.random.key(0), shape) * 100
  x = x.astype(SHAPES[shape])
  found = []
  for block in (1 << 16, 1 << 11, 1 << 30):
    monkeypatch.setattr(checksums_lib, 'CPU_BLOCK', block)
    jax.clear_caches()
    found.append(int(checksums([x])[0]))
  assert len(set(found)) == 1
  assert found[0] == by_numpy(np.asarray(x))
  if x.size > 1:  # the last element counts
    last = (*(n - 1 for n in shape),)
    assert int(checksums([x.at[last].add(1)])[0]) != found[0]


def by_numpy(x: np.ndarray) -> int:
  """The same number, of the whole array at once."""
  uint = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
  h = np.atleast_1d(x).view(uint).astype(np.uint32)
  for axis, index in enumerate(np.indices(x.shape, np.uint32)):
    h = h ^ mixed(index + np.uint32(0x9E3779B1 * (axis + 1) % 2**32))
  return int(mixed(h).sum(dtype=np.uint32))


def mixed(h: np.ndarray) -> np.ndarray:
  h = (h ^ h >> 16) * np.uint32(0x7FEB352D)
  h = (h ^ h >> 15) * np.uint32(0x846CA68B)
  return h ^ h >> 16


def test_no_two_elements_have_the_same_place():
  """Else they could trade places unnoticed; of random ones one pair does."""
  places = checksums_lib._places((300, 300), [0, 0], range(2))
  assert len(np.unique(places)) > places.size - 5
  x = np.arange(400, dtype=np.float32).reshape(20, 20)
  for a, b in (((3, 1), (0, 0)), ((1, 2), (2, 1)), ((6, 1), (2, 3))):
    swapped = x.copy()
    swapped[a], swapped[b] = x[b], x[a]
    assert checksums([swapped]) != checksums([x])


@pytest.mark.parametrize(
  'spec', [(), ('fsdp',), (None, 'tensor'), ('tensor', 'fsdp'), (('fsdp', 'tensor'),)]
)  # fmt: skip
def test_parts_add_up(spec):
  """Axes shared out over one mesh axis, two or none, the rest repeated."""
  where = jax.NamedSharding(sharding.make_mesh(1, 4, 2), jax.P(*spec))
  for shape in ((8, 16), (8, 4, 520), (16, 8, 2)):
    x = jax.random.normal(jax.random.key(1), shape)
    found = checksums([jax.device_put(x, where)])[0]
    assert int(found) == by_numpy(np.asarray(x))
