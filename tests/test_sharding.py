"""Layouts: which axis of what lies where, and that no result depends on it.

Dimension key: B batch, O output slots, D width, V vocabulary.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import two_processes
from jax.sharding import NamedSharding, PartitionSpec

from configs import llama2_7b, repro, tiny
from refrag_jax import resolve, sharding
from refrag_jax.errors import UserError
from refrag_jax.models import losses
from refrag_jax.models.refrag import init_params
from refrag_jax.session import with_shardings

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CONFIGS = {'tiny': tiny, 'repro': repro, 'llama2_7b': llama2_7b}


def mesh222():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def specs(tree):
  """path -> PartitionSpec of every leaf, on the 2 x 2 x 2 mesh."""
  leaves = jax.tree_util.tree_leaves_with_path(
    sharding.infer_shardings(tree, mesh222())
  )
  return {sharding.path_str(path): leaf.spec for path, leaf in leaves}


@pytest.mark.parametrize('name', CONFIGS)
def test_the_layout_of_every_parameter(name, tmp_path):
  """tests/golden has it; a change that is meant copies the new file there.

  All axes are larger than 1, so that none is left out for nothing.
  """
  model = resolve.build(CONFIGS[name].get_config()).model
  model = dataclasses.replace(
    model, piece_length=4
  )  # the group `cross` as well
  mesh = sharding.make_mesh(1, 2, 2, 2)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  found = sharding.layout(with_shardings(shapes, mesh))
  file = f'layout_{name}.txt'
  (tmp_path / file).write_text(found)
  assert found == (GOLDEN / file).read_text(), f'now in {tmp_path / file}'


def test_no_mesh_axis_is_named_twice():
  for name, spec in specs(toy.state('cpt')).items():
    axes = [axis for axis in jax.tree.leaves(tuple(spec)) if axis]
    assert len(axes) == len(set(axes)), name


def test_moments_lie_where_their_parameter_lies():
  state = toy.state('cpt')
  params = {f'params/{name}': s for name, s in specs(toy.params()).items()}
  moments = 0
  for name, spec in specs(state).items():
    if '/mu/' in name or '/nu/' in name:
      parameter = re.sub(r'^opt_state/.*/(mu|nu)/', 'params/', name)
      assert spec == params[parameter]
      moments += 1
  assert moments == 2 * len(jax.tree.leaves(toy.params())) - 2 * len(
    jax.tree.leaves(toy.params()['policy'])
  )


def test_a_parameter_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match="parameter 'decoder/gizmo/kernel'"):
    sharding.logical_axes('decoder/gizmo/kernel', 2)


def test_an_axis_that_does_not_divide_stays_whole():
  cfg = toy.replace('decoder', num_kv_heads=1, vocab_size=41)
  found = specs(toy.params(cfg))
  whole = PartitionSpec(None, ('fsdp', 'sequence'), None, None)
  assert found['decoder/layers/k_proj/kernel'] == whole
  assert found['decoder/embed_tokens'] == PartitionSpec(
    None, ('fsdp', 'sequence')
  )


def test_the_mesh_fills_up_or_says_why_not():
  assert dict(sharding.make_mesh(-1, 2, 1).shape) == dict(
    data=4, fsdp=2, tensor=1, sequence=1
  )
  with pytest.raises(UserError, match='data=4 x fsdp=2 x tensor=1 x .* would'):
    sharding.make_mesh(3, 2, 1)
  with pytest.raises(UserError, match='is not the 8 devices there are'):
    sharding.make_mesh(-1, 3, 1)


def test_constrain_pins_a_layout_in_a_mesh_and_nothing_outside():
  x = jnp.zeros((8, 3, 6))
  pin = lambda x: sharding.constrain(x, 'batch', None, 'mlp')
  assert 'sharding_constraint' not in str(jax.make_jaxpr(pin)(x))
  mesh = mesh222()
  with jax.set_mesh(mesh):
    expected = NamedSharding(
      mesh, PartitionSpec(('data', 'fsdp'), None, 'tensor')
    )
    assert jax.jit(pin)(x).sharding.is_equivalent_to(expected, 3)


# These divide less than (1, 2, 2, 2) does, and take minutes.
MESHES = [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1)]
QUICK = ('cpt',)  # a minute less than all of them
NUM_STEPS = 5


def losses_and_params(name, state, batch, attention='dense'):
  """Of some steps on one batch."""
  run, found = toy.step(name, attention=attention), []
  for _ in range(NUM_STEPS):
    state, metrics = run(state, batch)
    found.append([metrics[key] for key in ('loss', 'grad_norm', 'targets')])
  return np.array(found), state.params


@functools.cache
def on_one_device(name):
  return losses_and_params(name, toy.state(name), toy.step_batch(name))


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in toy.STEPS
  ],
)
def test_steps_on_all_four_axes_equal_those_on_one_device(name):
  same_steps(name, (1, 2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('name', list(toy.STEPS))
def test_steps_on_eight_devices_equal_those_on_one(name, shape):
  same_steps(name, shape)


def same_steps(name, shape):
  """Agreement 10; by blocks where a row lies on two devices."""
  expected, expected_params = on_one_device(name)
  mesh = sharding.make_mesh(*shape)
  state, batch = toy.state(name), toy.step_batch(name)
  with jax.set_mesh(mesh):
    placed = jax.device_put(state, sharding.infer_shardings(state, mesh))
    rows = jax.device_put(batch, sharding.batch_sharding(mesh))
    kind = 'blockwise' if mesh.shape['sequence'] > 1 else 'dense'
    found, params = losses_and_params(name, placed, rows, kind)
  assert len(params['decoder']['lm_head'].sharding.device_set) == 8
  np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)  # the gradient
  assert toy.distance(expected_params, params) < 1e-5
  assert toy.distance(toy.state(name).params, params) > 1e-3


@pytest.mark.parametrize('shape', [(2, 4, 1, 1), (1, 2, 1, 4)], ids=str)
def test_logits_in_pieces_gather_the_head_and_nothing_else(shape):
  """No device computes another's rows or positions: states are never gathered."""
  B, O, D, V = 16, 32, 8, 24
  mesh = sharding.make_mesh(*shape)
  with jax.set_mesh(mesh):
    laid = lambda x, *axes: jax.device_put(
      x, NamedSharding(mesh, sharding.to_spec(axes, x.shape, mesh))
    )
    rng = np.random.default_rng(0)
    hidden_BOD = rng.standard_normal((B, O, D)).astype(np.float32)
    head_DV = rng.standard_normal((D, V)).astype(np.float32)
    target_BO = rng.integers(0, V, (B, O)).astype(np.int32)
    loss = lambda block: (
      lambda *args: jnp.sin(losses.token_nll(*args, block)).sum()
    )
    grad = jax.jit(jax.value_and_grad(loss(8), (0, 1)))
    args = (
      laid(hidden_BOD, 'batch', 'sequence', None),
      laid(head_DV, 'embed', None),
      laid(target_BO, 'batch', 'sequence'),
    )
    hlo = grad.lower(*args).compile().as_text()
    found = grad(*args)
  gathered = re.findall(r'= (\S+?)\{\S* all-gather\(', hlo)
  assert set(gathered) == {f'f32[{D},{V}]'}
  want = jax.value_and_grad(loss(0), (0, 1))(hidden_BOD, head_DV, target_BO)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5),
    found,
    want,
  )


def test_a_torus_without_such_axes_is_split(monkeypatch):
  """8 x 8 on 4 x 4 x 4: JAX refuses it unless axes may be split."""
  make, asked = sharding.mesh_utils.create_device_mesh, []

  def torus(shape, devices, allow_split_physical_axes=False):
    asked.append(allow_split_physical_axes)
    if not allow_split_physical_axes:
      raise NotImplementedError('Failed to find assignment')
    return make(shape, devices)

  monkeypatch.setattr(sharding.mesh_utils, 'create_device_mesh', torus)
  mesh = sharding.make_mesh(2, 4, 1)
  assert asked == [False, True]
  assert mesh.devices.shape == (2, 4, 1, 1)
  assert {d.id for d in mesh.devices.flat} == set(range(8))


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A device as far as meshes ask: slices of 2 x 2 x 2 chips, in any order."""

  id: int
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'some'

  @property
  def slice_index(self):
    return self.id % 2

  @property
  def coords(self):
    return [self.id >> 1 & 1, self.id >> 2 & 1, self.id >> 3]


def test_across_slices_lies_data_alone():
  devices = [Tpu(i) for i in range(16)]
  mesh = sharding.make_mesh(4, 2, 2, 1, devices=devices)
  assert mesh.devices.shape == (4, 2, 2, 1)
  slices = [{d.slice_index for d in part.flat} for part in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(UserError, match='data=1 does not divide over the 2 sl'):
    sharding.make_mesh(1, 8, 2, 1, devices=devices)


OF_TWO = """
from refrag_jax.runtime import environment
environment.join_cluster(60, 30)
import jax
import numpy as np
from refrag_jax import sharding
from refrag_jax.session import to_device

first, out = jax.process_index() == 0, []
for shape in (
  (4, 1, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2), (1, 1, 2, 2), (1, 1, 4, 1)
):
  mesh = sharding.make_mesh(*shape)
  rows = sharding.local_rows(mesh, 8)
  batch = to_device({'x_BT': rows[:, None] + np.arange(3), 'y_B': rows}, mesh)
  whole_BT, whole_B = map(sharding.fetch, batch.values())
  np.testing.assert_array_equal(whole_B, np.arange(8))
  np.testing.assert_array_equal(whole_BT - whole_B[:, None], [[0, 1, 2]] * 8)
  out.append(len(rows))
# Rows of one device that lie apart, as a mesh may place them.
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1, 1, 1)
mesh = jax.sharding.Mesh(devices, sharding.MESH_AXES)
rows = sharding.local_rows(mesh, 8)
assert rows.tolist() == ([0, 1, 4, 5] if first else [2, 3, 6, 7])
whole_B = sharding.fetch(to_device({'y_B': rows}, mesh)['y_B'])
np.testing.assert_array_equal(whole_B, np.arange(8))
vote = sharding.Vote(mesh)
for said in ((not first, False), (False, first), (False, False), (False, False)):
  out += map(int, vote(*said))
print('found', *out)
"""


def test_rows_and_votes_of_two_processes():
  """Tensor and sequence may lie across them: then both hold the same rows."""
  # What each was asked is heard of by both, one call later.
  found = 'found 4 4 4 8 8 0 0 1 0 0 1 0 0'
  assert two_processes.last_lines(OF_TWO, devices=2) == [found] * 2
