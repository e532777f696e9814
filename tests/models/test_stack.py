"""Layers in a loop or one by one, and what they keep for their backward.

Dimension key: B batch, T positions, X chunks, M encoder tokens, D width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from refrag_jax import flops
from refrag_jax.models import attention
from refrag_jax.models.decoder import Decoder
from refrag_jax.models.encoders import ENCODERS
from refrag_jax.models.stack import ATTENTION, CUDNN, REMAT

B, T = 2, 24
FLOAT = jnp.dtype('float32')
MODERN = dataclasses.replace(
  toy.MODEL.encoder,
  kind='modernbert',
  position_offset=0,
  global_every=2,
  local_window=2,
  rope_theta=100.0,
  local_rope_theta=10.0,
)
STACKS = ('decoder', 'bert', 'modernbert')


def traced(name, remat, scan_layers, attention='dense'):
  """The gradient of a stack's parameters, traced, and the parameters."""
  rng = np.random.default_rng(0)
  if name == 'decoder':
    cfg = toy.MODEL.decoder
    module = Decoder(cfg, FLOAT, remat, scan_layers, attention)
    x_BTD = rng.standard_normal((B, T, cfg.width)).astype(np.float32)
    args = (x_BTD, np.tile(np.arange(T, dtype=np.int32), (B, 1)))
    run = lambda params: module.apply({'params': params}, *args)[0]
  else:
    cfg = MODERN if name == 'modernbert' else toy.MODEL.encoder
    module = ENCODERS[cfg.kind](cfg, FLOAT, remat, scan_layers)
    ids_XM = rng.integers(3, cfg.vocab_size, (4, 6)).astype(np.int32)
    args = (ids_XM, np.array([6, 3, 4, 5], np.int32))
    run = lambda params: module.apply({'params': params}, *args)
  params = module.init(jax.random.key(0), *args)['params']
  grad = jax.jit(jax.grad(lambda params: (run(params) ** 3).sum()))
  return grad.trace(params), params


@pytest.mark.parametrize(
  ('name', 'remat'),
  [
    ('decoder', 'full'),
    ('bert', 'none'),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [
        ('decoder', 'none'),
        ('bert', 'full'),
        ('modernbert', 'none'),
        ('modernbert', 'full'),
      ]
    ),
  ],
)
def test_layers_one_by_one_are_those_of_the_loop(name, remat):
  found, params = traced(name, remat, False)
  looped, same = traced(name, remat, True)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
  lowered, with_loop = found.lower(), looped.lower()
  assert 'stablehlo.while' not in lowered.as_text()
  assert 'stablehlo.while' in with_loop.as_text()
  compiled, loops = lowered.compile(), with_loop.compile()
  # XLA's own, of a scatter, are in both.
  number = [x.as_text().count(' while(') for x in (compiled, loops)]
  assert number[0] < number[1]
  assert toy.distance(loops(params), compiled(params)) < 1e-5


@pytest.mark.parametrize(
  'name',
  [
    'decoder',
    *(pytest.param(name, marks=pytest.mark.slow) for name in STACKS[1:]),
  ],
)
def test_layers_one_by_one_compute_again_what_they_do_not_keep(name):
  """XLA would merge what it sees twice, and keep it."""

  def executed(remat):
    cost = traced(name, remat, False)[0].lower().compile().cost_analysis()
    return cost['flops']

  assert executed('full') > 1.2 * executed('none')


@pytest.mark.slow
def test_dots_keep_what_attention_in_blocks_has_found():
  cost = {
    (remat, kind): flops.count(traced('decoder', remat, True, kind)[0].jaxpr)
    for remat in REMAT
    for kind in ('dense', 'blockwise')
  }
  assert cost['none', 'blockwise'] == cost['dots', 'blockwise']
  assert cost['dots', 'blockwise'] < cost['full', 'blockwise']
  assert cost['none', 'dense'] < cost['dots', 'dense'] < cost['full', 'dense']


def test_dots_keep_the_results_of_the_platforms_kernels():
  """By what JAX calls them: another name would only cost time."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  names = {
    value.name for value in vars(cudnn).values() if hasattr(value, 'bind')
  }
  assert CUDNN in names
  kept = REMAT['dots'](cudnn._dot_product_attention_fwd_p_wrapper)
  assert kept and not REMAT['dots'](jax.lax.exp_p)

  x_BTNH = jnp.ones((1, 128, 2, 128))
  splash = functools.partial(attention.splash, window=0, interpret=True)
  total = lambda q: splash(q, x_BTNH, x_BTNH, None, None).sum()
  assert f'name={ATTENTION}' in str(jax.make_jaxpr(jax.grad(total))(x_BTNH))
