"""The decoder's attention, in one of several equal ways (`model.attention`).

Dimension key: B batch, T query positions, S key positions, X a block of
queries, Y a block of keys, N query heads, M key/value heads, G = N / M, H head
dimension.

  dense      logits of all pairs at once, (B, N, T, S): quick where they are few
  blockwise  pairs of blocks, forward and backward: memory grows with T alone;
             plain JAX, so everywhere
  cudnn      NVIDIA's kernel, through jax.nn.dot_product_attention
  splash     the TPU's kernel, in JAX's Pallas library

A config may say `fused`: session.py makes it the kernel that the devices have,
or `blockwise`, before a model is made.

What a query may see is a rule about places, not a mask: a T x S array of them
would be as large as the logits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from refrag_jax import sharding
from refrag_jax.models import layers, stack

# Lengths of the blocks of `blockwise`, for speed alone: on a CPU their logits
# stay in the cache, elsewhere their products fill the matrix units.
QUERIES, KEYS = 256, 512
NEG = -1e30
NOWHERE = jnp.iinfo(jnp.int32).max


class Places(NamedTuple):
  """Where queries or keys stand; a leading axis of 1 is the same in each row.

  A query sees keys at its own place and before it, of its own segment.
  """

  index_BT: jax.Array  # int32
  segment_BT: jax.Array | None = None


def visible(query: Places, key: Places, window: int) -> jax.Array:
  """Which keys each query sees, bool (B, T, S); window 0: all before it."""
  back_BTS = query.index_BT[:, :, None] - key.index_BT[:, None]
  seen_BTS = back_BTS >= 0
  if window:
    seen_BTS &= back_BTS < window
  if query.segment_BT is not None:
    seen_BTS &= query.segment_BT[:, :, None] == key.segment_BT[:, None]
  return seen_BTS


def attend(
  kind: str, q_BTNH, k_BSMH, v_BSMH, query: Places, key: Places, window: int
) -> jax.Array:
  """Causal softmax attention, (B, T, N, H); softmax in float32.

  Args:
    kind: of ATTENTION. The fused kernels know neither places nor segments: with
      a cache or with packed rows `blockwise` stands in for them. One query at a
      time needs no blocks.
    window: keys that a query sees, its own place included; 0: all.
  """
  plain = k_BSMH.shape[1] == q_BTNH.shape[1] and query.segment_BT is None
  if q_BTNH.shape[1] == 1:
    kind = 'dense'
  elif kind in KERNELS and not plain:
    kind = 'blockwise'
  if kind == 'dense':  # XLA divides it by itself, in any layout
    mask_BTS = visible(query, key, window)
    return layers.attention(q_BTNH, k_BSMH, v_BSMH, mask_BTS)
  # The others would be gathered: each device takes its rows, queries and heads,
  # and all keys.
  heads = 'heads'
  if k_BSMH.shape[2] % sharding.axis_size('heads'):
    heads = None  # a key/value head stays with its queries
  rows, keys = ('batch', 'sequence'), ('batch', None)
  return sharding.per_device(
    functools.partial(ATTENTION[kind], window=window),
    (
      (*rows, heads, None),
      (*keys, heads, None),
      (*keys, heads, None),
      jax.tree.map(lambda _: rows, query),
      jax.tree.map(lambda _: keys, key),
    ),
    (*rows, heads, None),
  )(q_BTNH, k_BSMH, v_BSMH, query, key)


# --- Blocks, in plain JAX -----------------------------------------------------


def blockwise(
  q_BTNH, k_BSMH, v_BSMH, query: Places, key: Places, window: int
) -> jax.Array:
  """Attention (B, T, N, H) that holds a block of queries times one of keys.

  The softmax is gathered as the keys pass (Milakov and Gimelshein 2018); the
  backward computes each block's weights again from the row's logsumexp, as in
  FlashAttention (Dao et al. 2022).
  """
  B, T, N, H = q_BTNH.shape
  M = k_BSMH.shape[2]
  q_BTMGH = q_BTNH.reshape(B, T, M, N // M, H)
  out_BTMGH = _flash(
    window,
    _blocks(q_BTMGH, QUERIES),
    _blocks(k_BSMH, KEYS),
    _blocks(v_BSMH, KEYS),
    _blocks_of(query, QUERIES, -1),
    _blocks_of(key, KEYS, NOWHERE),
  )
  return _whole(out_BTMGH)[:, :T].reshape(B, T, N, H)


def _blocks(x_BT, size: int, fill: int = 0) -> jax.Array:
  """(blocks, B, size, ...), filled up at the end."""
  T = x_BT.shape[1]
  size = min(size, T)
  pad = ((0, 0), (0, -T % size)) + ((0, 0),) * (x_BT.ndim - 2)
  x_BT = jnp.pad(x_BT, pad, constant_values=fill)
  split = x_BT.reshape(x_BT.shape[0], -1, size, *x_BT.shape[2:])
  return split.swapaxes(0, 1)


def _blocks_of(places: Places, size: int, nowhere: int) -> Places:
  segment = places.segment_BT
  return Places(
    _blocks(places.index_BT, size, nowhere),
    None if segment is None else _blocks(segment, size),
  )


def _whole(x_PBX) -> jax.Array:
  """The inverse of `_blocks`, what was filled up included."""
  x_BPX = x_PBX.swapaxes(0, 1)
  return x_BPX.reshape(x_BPX.shape[0], -1, *x_BPX.shape[3:])


def _logits(q_BXMGH, k_BYMH, query: Places, key: Places, window: int):
  """Float32 (B, M, G, X, Y), NEG where a query does not see."""
  logits_BMGXY = jnp.einsum(
    'BXMGH,BYMH->BMGXY', q_BXMGH, k_BYMH, preferred_element_type=jnp.float32
  )
  logits_BMGXY *= q_BXMGH.shape[-1] ** -0.5
  seen_BXY = visible(query, key, window)
  return jnp.where(seen_BXY[:, None, None], logits_BMGXY, NEG)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(window: int, q, k, v, query: Places, key: Places) -> jax.Array:
  return _flash_forward(window, q, k, v, query, key)[0]


def _flash_forward(window, q, k, v, query, key):
  """Every leaf has its blocks as the leading axis."""

  def rows(block):
    q_BXMGH, query = block
    B, X, M, G, H = q_BXMGH.shape

    def add(carry, block):
      sum_BMGXH, norm_BMGX, top_BMGX = carry
      k_BYMH, v_BYMH, key = block
      logits_BMGXY = _logits(q_BXMGH, k_BYMH, query, key, window)
      new_BMGX = jnp.maximum(top_BMGX, logits_BMGXY.max(-1))
      weights_BMGXY = jnp.exp(logits_BMGXY - new_BMGX[..., None])
      kept_BMGX = jnp.exp(top_BMGX - new_BMGX)
      more_BMGXH = jnp.einsum(
        'BMGXY,BYMH->BMGXH',
        weights_BMGXY.astype(v_BYMH.dtype),
        v_BYMH,
        preferred_element_type=jnp.float32,
      )
      return (
        sum_BMGXH * kept_BMGX[..., None] + more_BMGXH,
        norm_BMGX * kept_BMGX + weights_BMGXY.sum(-1),
        new_BMGX,
      ), None

    start = (
      jnp.zeros((B, M, G, X, H), jnp.float32),
      jnp.zeros((B, M, G, X), jnp.float32),
      jnp.full((B, M, G, X), NEG, jnp.float32),
    )
    (sum_BMGXH, norm_BMGX, top_BMGX), _ = jax.lax.scan(add, start, (k, v, key))
    out_BMGXH = sum_BMGXH / norm_BMGX[..., None]
    out_BXMGH = out_BMGXH.transpose(0, 3, 1, 2, 4).astype(q_BXMGH.dtype)
    return out_BXMGH, top_BMGX + jnp.log(norm_BMGX)

  out, logsumexp = checkpoint_name(
    jax.lax.map(rows, (q, query)), stack.ATTENTION
  )
  return out, (q, k, v, query, key, out, logsumexp)


def _flash_backward(window, kept, d_out):
  q, k, v, query, key, out, logsumexp = kept

  def rows(sums, block):
    q_BXMGH, query, out_BXMGH, logsumexp_BMGX, d_out_BXMGH = block
    # The mean of d_weights_BMGXY under the row's weights.
    mean_BMGX = jnp.einsum(
      'BXMGH,BXMGH->BMGX',
      d_out_BXMGH,
      out_BXMGH,
      preferred_element_type=jnp.float32,
    )

    def add(dq_BXMGH, block):
      k_BYMH, v_BYMH, key, (dk_BYMH, dv_BYMH) = block
      dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
      logits_BMGXY = _logits(q_BXMGH, k_BYMH, query, key, window)
      weights_BMGXY = jnp.exp(logits_BMGXY - logsumexp_BMGX[..., None])
      d_weights_BMGXY = dot('BXMGH,BYMH->BMGXY', d_out_BXMGH, v_BYMH)
      d_logits_BMGXY = weights_BMGXY * (d_weights_BMGXY - mean_BMGX[..., None])
      d_logits_BMGXY *= q_BXMGH.shape[-1] ** -0.5
      weights_BMGXY = weights_BMGXY.astype(v_BYMH.dtype)
      d_logits_BMGXY = d_logits_BMGXY.astype(k_BYMH.dtype)
      dv_BYMH += dot('BMGXY,BXMGH->BYMH', weights_BMGXY, d_out_BXMGH)
      dk_BYMH += dot('BMGXY,BXMGH->BYMH', d_logits_BMGXY, q_BXMGH)
      dq_BXMGH += dot('BMGXY,BYMH->BXMGH', d_logits_BMGXY, k_BYMH)
      return dq_BXMGH, (dk_BYMH, dv_BYMH)

    dq_BXMGH, sums = jax.lax.scan(
      add, jnp.zeros(q_BXMGH.shape, jnp.float32), (k, v, key, sums)
    )
    return sums, dq_BXMGH.astype(q_BXMGH.dtype)

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(
    rows, (zeros(k), zeros(v)), (q, query, out, logsumexp, d_out)
  )
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_flash.defvjp(_flash_forward, _flash_backward)


# --- The platforms' kernels ---------------------------------------------------


def cudnn(q_BTNH, k_BSMH, v_BSMH, query, key, window: int) -> jax.Array:
  """NVIDIA's fused kernel, (B, T, N, H); float16 or bfloat16 alone."""
  del query, key  # causal over the index
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSMH,
    v_BSMH,
    is_causal=True,
    local_window_size=(window - 1, 0) if window else None,
    implementation='cudnn',
  )


def splash(
  q_BTNH, k_BSMH, v_BSMH, query, key, window: int, interpret: bool = False
) -> jax.Array:
  """The TPU's fused kernel, (B, T, N, H).

  Args:
    interpret: run it in plain JAX, for tests on a CPU.
  """
  del query, key
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  T, N, H = q_BTNH.shape[1:]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % LANES), (0, 0), (0, 0)))
  heads_first = lambda x: pad(x).swapaxes(1, 2)
  length = T + -T % LANES
  shape = (length, length)
  mask = masks.CausalMask(shape)
  if window:
    mask = masks.LocalMask(shape, (window - 1, 0), 0)
  # JAX's default is LANES; MaxText's configs/base.yml has 512 for all of them.
  size = max(n for n in (512, 256, LANES) if length % n == 0)
  attend = kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * N),
    block_sizes=kernel.BlockSizes(
      block_q=size,
      block_kv=size,
      block_kv_compute=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=stack.ATTENTION,
    interpret=interpret,
  )
  out_BNTH = jax.vmap(attend)(
    *map(heads_first, (q_BTNH * H**-0.5, k_BSMH, v_BSMH))
  )
  return out_BNTH.swapaxes(1, 2)[:, :T]


LANES = 128  # a TPU's registers: the kernel's blocks are multiples of it
KERNELS = {'cudnn': cudnn, 'splash': splash}
ATTENTION = {'blockwise': blockwise} | KERNELS
KINDS = ('dense', *ATTENTION)
