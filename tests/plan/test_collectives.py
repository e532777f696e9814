"""What is sent between devices: from real programs, and every way it is written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from refrag_jax import sharding
from refrag_jax.plan import collectives

NAMES = sharding.MESH_AXES


def found(f, mesh, *shapes):
  arguments = [
    jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    for shape, spec in shapes
  ]
  text = jax.jit(f).lower(*arguments).compile().as_text()
  rows = collectives.read(text, mesh.axis_names, mesh.devices.shape)
  return {(c.op, c.axes): (c.group, c.bytes, c.count) for c in rows}


def mapped(f, mesh):
  """Every device computes all of it, from the whole arrays."""
  return jax.shard_map(
    f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )


def test_each_kind_over_its_axes():
  mesh = sharding.make_mesh(2, 2, 2)
  x = ((16, 8), P())

  def f(x):
    rows = jax.lax.axis_index('data') + x
    a = jax.lax.psum(rows, ('data', 'tensor'))
    b = jax.lax.all_gather(a * x, 'fsdp', tiled=True)
    c = jax.lax.ppermute(b, 'tensor', [(0, 1), (1, 0)])
    return jax.lax.all_to_all(jnp.sin(c), 'data', 0, 1, tiled=True)

  rows = found(mapped(f, mesh), mesh, x)
  size = 16 * 8 * 4
  assert rows == {
    ('all-reduce', ('data', 'tensor')): (4, size, 1),
    ('all-gather', ('fsdp',)): (2, 2 * size, 1),
    ('collective-permute', ('tensor',)): (2, 2 * size, 1),
    ('all-to-all', ('data',)): (2, 2 * size, 1),
  }


def test_a_loop_counts_as_often_as_it_runs():
  mesh = sharding.make_mesh(1, 4, 2)

  def inner(x, _):
    return jnp.sin(jax.lax.psum(x, 'fsdp')), None

  def outer(x, _):
    x, _ = jax.lax.scan(inner, x, None, 5)
    return jnp.cos(jax.lax.psum(x, 'tensor')), None

  f = mapped(lambda x: jax.lax.scan(outer, x, None, 3)[0], mesh)
  rows = found(f, mesh, ((8,), P()))
  assert rows == {
    ('all-reduce', ('fsdp',)): (4, 32, 15),
    ('all-reduce', ('tensor',)): (2, 32, 3),
  }


def test_scattered_parameters_travel_once_a_layer():
  """FSDP as the compiler writes it: 6 layers, whose kernels lie in 8 parts."""
  mesh = sharding.make_mesh(1, 8, 1)

  def f(w_LDD, x_BD):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, jax.NamedSharding(mesh, P()))
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x_BD, w_LDD)[0]

  rows = found(f, mesh, ((6, 64, 64), P(None, 'fsdp')), ((8, 64), P('fsdp')))
  assert rows == {('all-gather', ('fsdp',)): (8, 64 * 64 * 4, 6)}


LOOP = """HloModule m
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %a = f32[8]{0} get-tuple-element(%p), index=1
  %r = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%a), channel_id=1, GROUPS, to_apply=%add
  %d = f32[2]{0} reduce-scatter-done(%r)
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(32)
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit.1), direction=LT
}
%fused.1 (q: f32[4]) -> f32[16] {
  %g.1 = bf16[16]{0:T(256)} all-gather(%q), channel_id=7, GROUPS, frontend_attributes={chain_id="3"}
}
%fused.2 (q: f32[4]) -> f32[16] {
  %g.2 = bf16[16]{0:T(256)} all-gather(%q), channel_id=7, GROUPS, frontend_attributes={chain_id="3"}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %t = (s32[], f32[8]{0}) tuple(%x)
  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%bodyTRIPS
  %f.1 = bf16[16]{0} fusion(%t), kind=kLoop, calls=%fused.1
  ROOT %f.2 = bf16[16]{0} fusion(%f.1), kind=kLoop, calls=%fused.2
}
"""


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', ('fsdp',)),
    ('replica_groups=[2,4]<=[8]', ('fsdp',)),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', ()),  # 0, 2, 4, 6: of no axis here
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ('fsdp',)),
    (
      "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
      ('fsdp',),
    ),
  ],
)
@pytest.mark.parametrize(
  'trips', ['', ', backend_config={"known_trip_count":{"n":"32"}}']
)
def test_the_texts_of_gpus_and_tpus(groups, axes, trips):
  text = LOOP.replace('GROUPS', groups).replace('TRIPS', trips)
  rows = collectives.read(text, NAMES, (2, 4, 1, 1))
  assert set(rows) == {
    collectives.Collective('reduce-scatter', axes, 4, 32, 32),
    # One transfer beside two fusions.
    collectives.Collective('all-gather', axes, 4, 32, 1),
  }


def test_axes_of_groups():
  axes = functools.partial(
    collectives.axes_of, axis_names=NAMES, axis_sizes=(2, 2, 2, 1)
  )
  assert axes([[0, 1], [2, 3], [4, 5], [6, 7]]) == ('tensor',)
  assert axes([[0, 2], [1, 3], [4, 6], [5, 7]]) == ('fsdp',)
  assert axes([[0, 1, 2, 3], [4, 5, 6, 7]]) == ('fsdp', 'tensor')
  assert axes([]) == NAMES[:3]  # the last one has one device
  assert axes([[0, 3], [1, 2]]) == ()  # a diagonal
  assert axes([[0, 1], [2, 6]]) == ()


def test_what_has_to_be_sent():
  of = lambda op: collectives.Collective(op, ('fsdp',), 8, 800, 2).sent
  assert of('all-gather') == of('reduce-scatter') == 2 * 700
  assert of('all-reduce') == 4 * 700
  assert of('collective-permute') == 2 * 800
  np.testing.assert_equal(of('all-to-all'), 1400)


def test_what_goes_to_other_slices():
  """A TPU hands it to its host; the line is as libtpu 0.0.42 writes it."""
  text = """HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {
  %after-all = token[] after-all()
  %send = (f32[1,1,128]{2,1,0:T(1,128)}, u32[], token[]) send(%x, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce_0"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %other = (f32[4]{0}, u32[], token[]) send(%x, %after-all), channel_id=3
}
"""
  (row,) = collectives.read(text, NAMES, (2, 4, 1, 1))
  assert row == collectives.Collective('send', ('data',), 2, 512, 1)
  assert row.sent == 512
