"""Building blocks that decoder, encoder and policy share.

Dimension key: B batch, T query positions, S key positions, D width, N query
heads, M key/value heads, H head dimension, F MLP width.

No architecture number has a default here: each comes from the config.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def fan_in_normal(num_in: int) -> nn.initializers.Initializer:
  """normal(0, 1 / sqrt(fan-in)) over the leading `num_in` axes of a kernel.

  At LLaMA-2-7B's width that is 0.016, beside the usual 0.02; at a width of 128
  the usual 0.02 would start five times too small and learn for a while nothing.
  """

  def init(key, shape, dtype=jnp.float32):
    fan_in = math.prod(shape[:num_in])
    return jax.random.normal(key, shape, dtype) * fan_in**-0.5

  return init


class Projection(nn.Module):
  """A dense layer with named output axes; kernel (in..., out...).

  Parameters are float32; the product runs in the input's dtype.
  """

  shape: tuple[int, ...]  # kernel
  num_in: int  # how many leading kernel axes are contracted
  bias: bool
  init: nn.initializers.Initializer | None = None  # None: fan_in_normal

  @nn.compact
  def __call__(self, x):
    init = self.init or fan_in_normal(self.num_in)
    kernel = self.param('kernel', init, self.shape, jnp.float32)
    x_axes = tuple(range(x.ndim - self.num_in, x.ndim))
    k_axes = tuple(range(self.num_in))
    y = jax.lax.dot_general(
      x, kernel.astype(x.dtype), ((x_axes, k_axes), ((), ()))
    )
    if self.bias:
      bias = self.param(
        'bias', nn.initializers.zeros, self.shape[self.num_in :], jnp.float32
      ).astype(x.dtype)
      y += bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (bfloat16 squares lose the mean)."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
    return (x32 * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias, in float32."""

  eps: float
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, -1, keepdims=True)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
    x32 *= scale.reshape(shape)
    if self.use_bias:
      bias = self.param(
        'bias', nn.initializers.zeros, x.shape[-1:], jnp.float32
      )
      x32 += bias.reshape(shape)
    return x32.astype(x.dtype)


class RopeScaling(NamedTuple):
  """Llama 3.1's stretching of slow rotations; see DecoderConfig."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int


def rope_angles(
  positions_BT: jax.Array,
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
):
  """Rotary angles (sin, cos), each float32 (B, T, 1, H/2).

  In float32 throughout: bfloat16 cannot even count past 256.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = theta**-exponent
  if scaling is not None and scaling.factor != 1:
    turns = scaling.original_length * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency *= kept + (1 - kept) / scaling.factor
  angle = positions_BT[..., None, None].astype(jnp.float32) * frequency.reshape(
    1, 1, 1, -1
  )
  return jnp.sin(angle), jnp.cos(angle)


def apply_rope(x_BTNH: jax.Array, angles) -> jax.Array:
  """Rotates halves, (B, T, N, H), as Hugging Face does; not pairs."""
  sin, cos = angles
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(
    x_BTNH.dtype
  )


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x Phi(x), computed in float32 whatever x is.

  By erf, since the erfc of jax.nn.gelu is dearer. What is kept for the backward
  is x.
  """
  x32 = x.astype(jnp.float32)
  return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x):
  return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, d_out):
  x32 = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * x32**2) / (2 * math.pi) ** 0.5
  slope = _normal_cdf(x32) + x32 * density
  return ((d_out.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def einsum32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the einsum of two arrays of one dtype, in float32.

  Its gradients are products in that dtype, as a fused kernel takes them and as
  those of `Projection` are, sums over devices included: JAX would multiply the
  float32 gradient of the result, at half the speed of the matrix units and
  twice the bytes.

  Args:
    spec: such as 'BOD,DV->BOV'; every index stands in two of the three.
  """
  if a.dtype == jnp.float32:
    return jnp.einsum(spec, a, b)
  assert a.dtype == b.dtype, (a.dtype, b.dtype)
  return _einsum32(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum32(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum32_forward(spec, a, b):
  # Each is kept for the other's gradient; a frozen one has none.
  kept = (a.value if b.perturbed else None, b.value if a.perturbed else None)
  return _einsum32(spec, a.value, b.value), kept


def _einsum32_backward(spec, kept, d_out):
  a, b = kept
  of_a, of_b, of_out = spec.replace('->', ',').split(',')
  d_out = d_out.astype((b if a is None else a).dtype)
  d_a = d_b = None
  if b is not None:
    d_a = jnp.einsum(f'{of_out},{of_b}->{of_a}', d_out, b)
  if a is not None:
    d_b = jnp.einsum(f'{of_out},{of_a}->{of_b}', d_out, a)
  return d_a, d_b


_einsum32.defvjp(_einsum32_forward, _einsum32_backward, symbolic_zeros=True)


def attention(q_BTNH, k_BSMH, v_BSMH, mask_BTS) -> jax.Array:
  """Softmax attention, grouped-query where N > M; softmax in float32.

  mask_BTS: True where the query may look. A query that may look nowhere
  (padding) gets a finite average that nobody reads.
  """
  B, T, N, H = q_BTNH.shape
  M = k_BSMH.shape[2]
  q_BMGTH = q_BTNH.reshape(B, T, M, N // M, H).transpose(0, 2, 3, 1, 4)
  logits = einsum32('BMGTH,BSMH->BMGTS', q_BMGTH, k_BSMH)
  logits = jnp.where(mask_BTS[:, None, None], logits * H**-0.5, -1e30)
  weights = jax.nn.softmax(logits, axis=-1).astype(v_BSMH.dtype)
  out = jnp.einsum('BMGTS,BSMH->BTMGH', weights, v_BSMH)
  return out.reshape(B, T, N, H)
