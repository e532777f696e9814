"""Every way of attending gives what the dense one gives, on any mesh.

Dimension key: B batch, T queries, S keys, N query heads, M key/value heads, H
head dimension.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refrag_jax import flops, sharding
from refrag_jax.config import check
from refrag_jax.models import attention, layers
from refrag_jax.models.attention import Places


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks in rows of a few places, the last one not full."""
  monkeypatch.setattr(attention, 'QUERIES', 8)
  monkeypatch.setattr(attention, 'KEYS', 4)


def arrays(B=4, T=19, S=19, N=6, M=2, H=8, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (B, T, N, H), (B, S, M, H), (B, S, M, H)
  return [
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def index(number):
  return jnp.arange(number, dtype=jnp.int32)[None]


def places(case, B=4, T=19, S=19):
  """Queries and keys of a plain row, a packed one, and against a cache."""
  if case == 'packed':
    lengths = [[7, 12], [19, 0], [3, 10], [0, 0]]  # the rest is padding, 0
    segments = np.zeros((B, T), np.int32)
    for row, sizes in zip(segments, lengths, strict=True):
      row[: sizes[0]], row[sizes[0] : sum(sizes)] = 1, 2
    both = Places(index(T), jnp.asarray(segments))
    return both, both
  if case == 'cache':
    start = jnp.array([0, 2, 5, 9], jnp.int32)[:, None]
    return Places(start + index(T)), Places(index(S))
  return Places(index(T)), Places(index(T))


def by_place(out_BTNH, sin):
  """What each output gives to a loss in which all count differently."""
  return sin(out_BTNH + 0.3 * np.arange(out_BTNH.shape[1])[None, :, None, None])


def value_and_grads(kind, window, query, key):
  """Of the sum of `by_place`."""

  def loss(q_BTNH, k_BSMH, v_BSMH):
    out_BTNH = attention.attend(
      kind, q_BTNH, k_BSMH, v_BSMH, query, key, window
    )
    return by_place(out_BTNH, jnp.sin).sum()

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize('window', [0, 6])
@pytest.mark.parametrize('case', ['plain', 'packed', 'cache'])
def test_blocks_equal_the_dense_product(case, window):
  T, S = (10, 19) if case == 'cache' else (19, 19)
  query, key = places(case, T=T, S=S)
  q_BTNH, k_BSMH, v_BSMH = arrays(T=T, S=S)
  args = q_BTNH, k_BSMH, v_BSMH
  want, got = (
    np.float64(
      jax.jit(functools.partial(attention.attend, kind, window=window))(
        *args, query=query, key=key
      )
    )
    for kind in ('dense', 'blockwise')
  )
  np.testing.assert_allclose(got, want, atol=1e-6)
  # Thousands of sines cancel each other: float32's sum has lost the digits.
  np.testing.assert_allclose(
    by_place(got, np.sin).sum(), by_place(want, np.sin).sum(), rtol=1e-6
  )
  _, want_grads = value_and_grads('dense', window, query, key)(*args)
  _, got_grads = value_and_grads('blockwise', window, query, key)(*args)
  for a, b in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('window', [0, 6])
@pytest.mark.parametrize('case', ['plain', 'packed', 'cache'])
def test_blocks_are_left_out_where_nothing_is_seen(case, window):
  """By the mask itself; on a CPU what is left out is not computed either."""
  T, S = (10, 19) if case == 'cache' else (19, 19)
  query, key = places(case, T=T, S=S)
  seen_BTS = np.array(attention.visible(query, key, window))
  got_PR = np.array(
    attention._seen(
      attention._blocks_of(query, 8, -1),
      attention._blocks_of(key, 4, attention.NOWHERE),
      window,
    )
  )
  for p, r in np.ndindex(got_PR.shape):
    of_block = seen_BTS[:, 8 * p :, 4 * r :][:, :8, :4]
    if got_PR[p, r] == attention.NONE:
      assert not of_block.any()
    elif got_PR[p, r] == attention.ALL:
      assert of_block.all() and of_block.shape[2] == 4
    elif case == 'plain':  # nothing is computed in vain
      assert of_block.any()
  if case == 'plain' and not window:
    assert got_PR.tolist() == [
      [1, 1, 0, 0, 0],
      [2, 2, 1, 1, 0],
      [2, 2, 2, 2, 1],
    ]


def test_a_cpu_does_not_look_at_keys_that_no_query_sees():
  query, key = places('cache', T=4, S=19)
  q_BTNH, k_BSMH, v_BSMH = arrays(T=4, S=19)
  run = value_and_grads('blockwise', 0, query, key)
  want, _ = run(q_BTNH, k_BSMH, v_BSMH)
  behind = np.arange(19)[:, None, None] >= 16  # queries stand before 13
  got, grads = run(
    q_BTNH, *(jnp.where(behind, jnp.nan, x) for x in (k_BSMH, v_BSMH))
  )
  assert got == want
  assert all(np.isfinite(x).all() for x in grads)


MESHES = [(2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8)]


@pytest.mark.parametrize('heads', [(4, 2), (4, 1)])  # one head is not divided
@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('kind', ['dense', 'blockwise'])
def test_on_a_mesh_as_on_one_device(kind, shape, heads):
  N, M = heads
  T = 16 if M > 1 else 19  # nor are 19 places
  query, key = places('packed' if T == 19 else 'plain', T=T, S=T)
  q_BTNH, k_BSMH, v_BSMH = arrays(B=4, T=T, S=T, N=N, M=M)
  want, want_grads = value_and_grads('dense', 0, query, key)(
    q_BTNH, k_BSMH, v_BSMH
  )
  mesh = sharding.make_mesh(*shape)
  with jax.set_mesh(mesh):
    put = lambda x, *axes: jax.device_put(
      x, jax.NamedSharding(mesh, sharding.to_spec(axes, x.shape, mesh))
    )
    got, got_grads = value_and_grads(kind, 0, query, key)(
      put(q_BTNH, 'batch', 'sequence', 'heads', None),
      put(k_BSMH, 'batch', None, 'heads', None),
      put(v_BSMH, 'batch', None, 'heads', None),
    )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-4)  # 2,000 sines
  for a, b in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def largest(jaxpr) -> int:
  """Elements of the largest array that a program makes, loops included."""
  sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
  inner = [
    largest(getattr(j, 'jaxpr', j))
    for eqn in jaxpr.eqns
    for j in jax.extend.core.jaxprs_in_params(eqn.params)
  ]
  return max(sizes + inner, default=0)


def test_blocks_never_hold_all_pairs():
  T = 512
  query, key = places('plain', T=T)
  args = arrays(B=1, T=T, S=T, N=2, M=1, H=2)
  traced = lambda kind: jax.make_jaxpr(value_and_grads(kind, 0, query, key))(
    *args
  )
  assert largest(traced('dense').jaxpr) >= 2 * T * T
  assert largest(traced('blockwise').jaxpr) < T * T // 8


def test_blocks_cost_seven_products_where_the_dense_one_costs_six():
  """Forward 2; backward 4, and the logits once more."""
  query, key = places('plain', T=16)
  args = arrays(T=16, S=16)
  count = lambda kind: flops.count(
    jax.make_jaxpr(value_and_grads(kind, 0, query, key))(*args)
  )
  delta = 2 * args[0].size  # a row's mean of d_weights, a product of vectors
  assert (count('blockwise') - delta) * 6 == count('dense') * 7


def test_one_query_needs_no_blocks(monkeypatch):
  monkeypatch.setattr(attention, 'blockwise', None)
  query, key = places('cache', T=1)
  out_BTNH = attention.attend('blockwise', *arrays(T=1), query, key, 0)
  assert out_BTNH.shape == (4, 1, 6, 8)


@pytest.mark.parametrize('window', [0, 6])
def test_the_tpu_kernel_equals_the_dense_product(window, monkeypatch):
  """Run in plain JAX; a TPU compiles the same program."""
  T = 150
  monkeypatch.setitem(
    attention.ATTENTION,
    'splash',
    functools.partial(attention.splash, interpret=True),
  )
  query, key = places('plain', T=T)
  args = arrays(B=2, T=T, S=T, N=4, M=2, H=128)
  want, want_grads = value_and_grads('dense', window, query, key)(*args)
  got, got_grads = value_and_grads('splash', window, query, key)(*args)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('window', [0, 6])
def test_what_cudnn_is_asked_equals_the_dense_product(window, monkeypatch):
  """The same call, answered by XLA: the kernel is NVIDIA's alone."""
  ask = jax.nn.dot_product_attention

  def answer(*args, implementation, **kwargs):
    assert implementation == 'cudnn'
    return ask(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', answer)
  query, key = places('plain')
  want, _ = value_and_grads('dense', window, query, key)(*arrays())
  got, _ = value_and_grads('cudnn', window, query, key)(*arrays())
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('window', [0, 6])
@pytest.mark.parametrize('S', [16, 48, 4608])  # the last one in several parts
def test_the_gpu_kernel_of_a_step_equals_the_plain_products(
  S, window, monkeypatch
):
  """Run in plain JAX; a GPU compiles the same program."""
  monkeypatch.setattr(
    attention,
    'triton_decode',
    functools.partial(attention.triton_decode, interpret=True),
  )
  B, N, M, H = 4, 6, 2, 8
  q_B1NH, k_B1MH, v_B1MH = arrays(B=B, T=1, S=1, N=N, M=M, H=H)
  _, *held = arrays(B=B, T=1, S=S, N=N, M=M, H=H, seed=1)
  cache = {name: x.swapaxes(1, 2) for name, x in zip('kv', held, strict=True)}
  at_B1 = jnp.array([[0], [7], [S - 1], [S]], jnp.int32)  # the last: nobody
  want, got = (
    attention.decode(
      kind, q_B1NH, k_B1MH, v_B1MH, cache, Places(at_B1), Places(index(S)),
      window,
    )
    for kind in ('dense', 'cudnn')
  )  # fmt: skip
  np.testing.assert_allclose(got[0][:3], want[0][:3], atol=1e-5)
  assert (got[0][3] == 0).all()
  jax.tree.map(np.testing.assert_array_equal, got[1], want[1])


def test_a_cache_that_the_gpu_kernel_cannot_read_is_read_plainly(monkeypatch):
  monkeypatch.setattr(attention, 'triton_decode', None)
  assert attention.triton_takes(4608, 64) and attention.triton_takes(16, 128)
  for S, H in ((20, 64), (48, 80)):
    assert not attention.triton_takes(S, H)
    q_B1NH, k_B1MH, v_B1MH = arrays(T=1, S=1, H=H)
    cache = dict.fromkeys('kv', jnp.ones((4, 2, S, H)))
    attention.decode(
      'cudnn', q_B1NH, k_B1MH, v_B1MH, cache,
      Places(jnp.full((4, 1), 3)), Places(index(S)), 0,
    )  # fmt: skip


@pytest.mark.parametrize('S', [16, 1536])  # one page, and three
@pytest.mark.parametrize('M', [1, 2])
def test_the_tpu_kernel_of_a_step_equals_the_plain_products(S, M):
  """In plain JAX; it multiplies in bfloat16, so that is what both are given."""
  from jax.experimental.pallas import tpu

  B, N, H = 4, 6, attention.LANES
  narrow = lambda x: x.astype(jnp.bfloat16)
  q_B1NH, *held = map(narrow, arrays(B=B, T=S, S=S, N=N, M=M, H=H))
  k_BMSH, v_BMSH = (x.swapaxes(1, 2) for x in held)
  at_B1 = jnp.array([[0], [7], [S - 1], [S]], jnp.int32)  # the last: nobody
  args = (q_B1NH[:, :1], k_BMSH, v_BMSH, at_B1)
  want = attention._decode(*args, live=S, window=0)
  with tpu.force_tpu_interpret_mode():
    got = jax.jit(attention.paged_decode, static_argnums=4)(*args, 0)
  np.testing.assert_allclose(
    got[:3].astype(jnp.float32), want[:3].astype(jnp.float32), atol=0.02
  )
  assert (got[3] == 0).all()


@pytest.mark.parametrize('window', [0, 6])
@pytest.mark.parametrize(('S', 'H'), [(4608, 128), (24, 128), (16, 64)])
def test_the_tpu_kernel_reads_what_it_can_and_the_rest_is_read_plainly(
  S, H, window, monkeypatch
):
  read = lambda q_B1NH, *_, window: q_B1NH + 100
  monkeypatch.setattr(attention, 'paged_decode', read)
  q_B1NH, k_B1MH, v_B1MH = arrays(T=1, S=1, H=H)
  out_B1NH, _ = attention.decode(
    'splash', q_B1NH, k_B1MH, v_B1MH,
    dict.fromkeys('kv', jnp.ones((4, 2, S, H))),
    Places(jnp.full((4, 1), 3)), Places(index(S)), window,
  )  # fmt: skip
  whole = (S, H, window) == (4608, 128, 0)
  assert (out_B1NH > 50).all() == whole


@pytest.mark.parametrize('kind', attention.KERNELS)
@pytest.mark.parametrize('case', ['packed', 'cache'])
def test_fused_kernels_leave_what_they_do_not_know_to_blocks(
  kind, case, monkeypatch
):
  monkeypatch.setitem(attention.ATTENTION, kind, None)
  T, S = (10, 19) if case == 'cache' else (19, 19)
  query, key = places(case, T=T, S=S)
  args = arrays(T=T, S=S)
  got = attention.attend(kind, *args, query, key, 0)
  np.testing.assert_array_equal(
    got, attention.attend('blockwise', *args, query, key, 0)
  )


def test_the_config_knows_the_same_kinds():
  # What `fused` is follows from the devices, before the model is made.
  assert (*attention.KINDS, 'fused') == check.ATTENTION
  assert tuple(attention.KERNELS) == check.KERNELS


# --- Float32 products of bfloat16 arrays --------------------------------------

PRODUCTS = [
  ('BMGTH,BSMH->BMGTS', (2, 3, 2, 5, 4), (2, 7, 3, 4)),
  ('BOD,DV->BOV', (2, 5, 4), (4, 9)),
]


def gradients(einsum, spec, a, b):
  loss = lambda a, b: jnp.sin(einsum(spec, a, b)).sum()
  return jax.grad(loss, (0, 1))(a, b)


@pytest.mark.parametrize(('spec', 'of_a', 'of_b'), PRODUCTS)
def test_gradients_of_a_float32_product_are_products_of_bfloat16(
  spec, of_a, of_b
):
  a, b = (
    jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
    for i, shape in enumerate((of_a, of_b))
  )
  assert layers.einsum32(spec, a, b).dtype == jnp.float32
  exact = [x.astype(jnp.float32) for x in (a, b)]
  np.testing.assert_allclose(
    layers.einsum32(spec, a, b), jnp.einsum(spec, *exact), rtol=1e-5, atol=1e-6
  )
  for got, want in zip(
    gradients(layers.einsum32, spec, a, b),
    gradients(jnp.einsum, spec, *exact),
    strict=True,
  ):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      got.astype(jnp.float32), want, atol=2**-6 * np.abs(want).max()
    )

  jaxpr = jax.make_jaxpr(lambda a, b: gradients(layers.einsum32, spec, a, b))
  dtypes = {
    v.aval.dtype
    for eqn in jaxpr(a, b).eqns
    if eqn.primitive.name == 'dot_general'
    for v in eqn.invars
  }
  assert dtypes == {jnp.dtype('bfloat16')}


def test_float32_products_are_jax_s_own():
  spec, of_a, of_b = PRODUCTS[0]
  a, b = jnp.ones(of_a), jnp.ones(of_b)
  traced = [
    str(jax.make_jaxpr(lambda a, b: gradients(einsum, spec, a, b))(a, b))
    for einsum in (layers.einsum32, jnp.einsum)
  ]
  assert traced[0] == traced[1]


def test_a_frozen_operand_of_a_product_costs_no_gradient():
  spec, of_a, of_b = PRODUCTS[1]
  a, b = jnp.ones(of_a, jnp.bfloat16), jnp.ones(of_b, jnp.bfloat16)
  loss = lambda a, b: layers.einsum32(spec, a, b).sum()
  count = lambda which: flops.count(jax.make_jaxpr(jax.grad(loss, which))(a, b))
  product = 2 * math.prod(of_a) * of_b[-1]
  assert (count(0), count((0, 1))) == (2 * product, 3 * product)
