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
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from refrag_jax import sharding
from refrag_jax.models import layers, stack

# Lengths of the blocks of `blockwise`, for speed alone: on a CPU their logits
# stay in the cache, elsewhere their products fill the matrix units.
QUERIES, KEYS = 256, 512
TURN = 6  # heads of a cache that a CPU reads at once, at most, likewise
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
    kind: of KINDS. The fused kernels know neither places nor segments: with
      packed rows `blockwise` stands in for them. One query needs no blocks.
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
  heads = _shared_out(k_BSMH)
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


def _shared_out(k_BSMH) -> str | None:
  """The axis of the heads; None where the key/value heads do not divide."""
  return None if k_BSMH.shape[2] % sharding.axis_size('heads') else 'heads'


def decode(
  kind: str, q_B1NH, k_B1MH, v_B1MH, cache: dict, query: Places, key: Places,
  window: int,
) -> tuple[jax.Array, dict]:  # fmt: skip
  """Attention of one position more of each row, with those in the cache.

  Args:
    kind: of KINDS; with `cudnn` and `splash` the cache is read by a kernel of
      JAX's Pallas library where it can, else by plain products as with others.
    cache: {'k', 'v'}: (B, M, S, H), position p in slot p. A head's keys lie
      side by side, as they are read.
    query: where each row's new position stands; beyond S nothing is written.
    key: of the slots that are looked at, the first ones.

  Returns:
    (B, 1, N, H), and the cache with the new keys and values in it.
  """
  heads = _shared_out(k_B1MH)
  in_cache = ('batch', heads, None, None)
  by_position = ('batch', None, heads, None)
  put = sharding.per_device(
    _put, (in_cache, by_position, ('batch', None)), in_cache
  )
  cache = {
    'k': put(cache['k'], k_B1MH, query.index_BT),
    'v': put(cache['v'], v_B1MH, query.index_BT),
  }
  S, H = cache['k'].shape[2:]
  look = functools.partial(_decode, live=key.index_BT.shape[1])
  if kind == 'cudnn' and triton_takes(S, H):
    look = triton_decode
  elif kind == 'splash' and paged_takes(S, H, window):
    look = paged_decode
  look = functools.partial(look, window=window)
  out_B1NH = sharding.per_device(
    look, (by_position, in_cache, in_cache, ('batch', None)), by_position
  )(q_B1NH, cache['k'], cache['v'], query.index_BT)
  return out_B1NH, cache


def _put(cache_BMSH, new_B1MH, index_B1):
  """The cache with a position more of each row, in place.

  By rows and heads: an update of one place alone XLA makes one of a slice, with
  a test whether it is inside, and copies the cache for that. So it still does
  where a device has one row and one key/value head.
  """
  B, M, S, H = cache_BMSH.shape
  slot_X, heads_X = jnp.repeat(index_B1[:, 0], M), jnp.arange(B * M)
  new_XH = new_B1MH.reshape(B * M, H)
  cache_XSH = cache_BMSH.reshape(B * M, S, H)
  cache_XSH = cache_XSH.at[heads_X, slot_X].set(new_XH, mode='drop')
  return cache_XSH.reshape(B, M, S, H)


def _decode(q_B1NH, k_BMSH, v_BMSH, index_B1, live: int, window: int):
  B, _, N, H = q_B1NH.shape
  M, S = k_BMSH.shape[1:3]
  X = B * M  # each key/value head of a row by itself

  def of(q_XGH, k_XSH, v_XSH, index_X1):
    key = Places(jnp.arange(live, dtype=jnp.int32)[None])
    seen_X1S = visible(Places(index_X1), key, window)
    logits_XGS = layers.einsum32('XGH,XSH->XGS', q_XGH, k_XSH)
    logits_XGS = jnp.where(seen_X1S, logits_XGS * H**-0.5, NEG)
    weights_XGS = jax.nn.softmax(logits_XGS, -1).astype(v_XSH.dtype)
    return jnp.einsum('XGS,XSH->XGH', weights_XGS, v_XSH)

  def at_once(q_XGH, k_XSH, v_XSH, index_X1):
    return of(q_XGH, k_XSH[:, :live], v_XSH[:, :live], index_X1)

  def in_turns(q_XGH, k_XSH, v_XSH, index_X1):
    size = max(n for n in range(1, TURN + 1) if X % n == 0 and n < max(X, 2))

    def turn(i):
      part = lambda x, *shape: jax.lax.dynamic_slice(
        x, (i * size,) + (0,) * (x.ndim - 1), (size, *shape)
      )
      return of(
        part(q_XGH, N // M, H),
        part(k_XSH, live, H),
        part(v_XSH, live, H),
        part(index_X1, 1),
      )

    return jax.lax.map(turn, jnp.arange(X // size)).reshape(X, N // M, H)

  # On a CPU a slice of all would be copied; that of few stays near, and what
  # only a loop reads is not copied for being written just before.
  out_XGH = jax.lax.platform_dependent(
    q_B1NH.reshape(X, N // M, H),
    k_BMSH.reshape(X, S, H),
    v_BMSH.reshape(X, S, H),
    jnp.repeat(index_B1, M, 0),
    cpu=in_turns,
    default=at_once,
  )
  return out_XGH.reshape(B, 1, N, H)


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
  G = N // M
  X = min(QUERIES, T)
  q_PBXMGH = _blocks(q_BTNH.reshape(B, T, M, G, H), QUERIES)
  # The queries that share a key/value head stand in one matrix, so that a block
  # is one product a head.
  q_PBMRH = q_PBXMGH.transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, M, G * X, H)
  out_PBMRH = _flash(
    window,
    q_PBMRH,
    _blocks(k_BSMH, KEYS).swapaxes(2, 3),
    _blocks(v_BSMH, KEYS).swapaxes(2, 3),
    _blocks_of(query, QUERIES, -1),
    _blocks_of(key, KEYS, NOWHERE),
  )
  out_PBMGXH = out_PBMRH.reshape(-1, B, M, G, X, H)
  out_BPXMGH = out_PBMGXH.transpose(1, 0, 4, 2, 3, 5)
  return out_BPXMGH.reshape(B, -1, N, H)[:, :T]


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


NONE, SOME, ALL = range(3)  # of a block's pairs are visible


def _seen(query: Places, key: Places, window: int) -> jax.Array:
  """NONE, SOME or ALL for each block of queries and of keys, (P, R).

  Bounds: NONE and ALL are certain, SOME is not.
  """
  there = query.index_BT >= 0  # the others are filled up
  q_min = jnp.where(there, query.index_BT, NOWHERE).min(-1)[:, None]
  q_max = query.index_BT.max(-1)[:, None]
  k_min, k_max = key.index_BT.min(-1)[None], key.index_BT.max(-1)[None]
  none, whole = q_max < k_min, q_min >= k_max
  if window:
    none |= q_min - k_max >= window
    whole &= q_max - k_min < window
  if query.segment_BT is not None:
    whole &= False
  return jnp.where(none.all(-1), NONE, jnp.where(whole.all(-1), ALL, SOME))


def _where_seen(seen, add, carry, block):
  """`add(carry, block, masked)`, or `carry` where there is nothing to see.

  A CPU leaves out what no query of a block sees, half of a long row. Elsewhere
  a branch in every turn of the loop has not been measured: all is masked.
  """
  masked = functools.partial(add, masked=True)
  branches = [lambda carry, block: carry, masked]  # NONE, SOME, ALL
  branches.append(functools.partial(add, masked=False))
  return jax.lax.platform_dependent(
    seen,
    carry,
    block,
    cpu=lambda *args: jax.lax.switch(args[0], branches, *args[1:]),
    default=lambda seen, carry, block: masked(carry, block),
  )


def _logits(q_BMRH, k_BMYH, query: Places, key: Places, window: int, masked):
  """Float32 (B, M, R, Y); if `masked`, NEG where a query does not see."""
  logits_BMRY = jnp.einsum(
    'BMRH,BMYH->BMRY', q_BMRH, k_BMYH, preferred_element_type=jnp.float32
  )
  logits_BMRY *= q_BMRH.shape[-1] ** -0.5
  if not masked:
    return logits_BMRY
  seen_BXY = visible(query, key, window)
  B, M, R, Y = logits_BMRY.shape
  logits_BMGXY = logits_BMRY.reshape(B, M, -1, seen_BXY.shape[1], Y)
  masked_BMGXY = jnp.where(seen_BXY[:, None, None], logits_BMGXY, NEG)
  return masked_BMGXY.reshape(B, M, R, Y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(window: int, q, k, v, query: Places, key: Places) -> jax.Array:
  return _flash_forward(window, q, k, v, query, key)[0]


def _flash_forward(window, q, k, v, query, key):
  """Every leaf has its blocks as the leading axis."""

  def rows(block):
    q_BMRH, query, seen_R = block
    B, M, R, H = q_BMRH.shape

    def add(carry, block, masked):
      sum_BMRH, norm_BMR, top_BMR = carry
      k_BMYH, v_BMYH, key = block
      logits_BMRY = _logits(q_BMRH, k_BMYH, query, key, window, masked)
      new_BMR = jnp.maximum(top_BMR, logits_BMRY.max(-1))
      weights_BMRY = jnp.exp(logits_BMRY - new_BMR[..., None])
      kept_BMR = jnp.exp(top_BMR - new_BMR)
      more_BMRH = jnp.einsum(
        'BMRY,BMYH->BMRH',
        weights_BMRY.astype(v_BMYH.dtype),
        v_BMYH,
        preferred_element_type=jnp.float32,
      )
      return (
        sum_BMRH * kept_BMR[..., None] + more_BMRH,
        norm_BMR * kept_BMR + weights_BMRY.sum(-1),
        new_BMR,
      )

    def step(carry, block):
      seen, *block = block
      return _where_seen(seen, add, carry, block), None

    start = (
      jnp.zeros((B, M, R, H), jnp.float32),
      jnp.zeros((B, M, R), jnp.float32),
      jnp.full((B, M, R), NEG, jnp.float32),
    )
    (sum_BMRH, norm_BMR, top_BMR), _ = jax.lax.scan(
      step, start, (seen_R, k, v, key)
    )
    # Queries that see nothing are padding; 0 / 0 would spread from them.
    norm_BMR = jnp.maximum(norm_BMR, jnp.finfo(jnp.float32).tiny)
    out_BMRH = (sum_BMRH / norm_BMR[..., None]).astype(q_BMRH.dtype)
    return out_BMRH, top_BMR + jnp.log(norm_BMR)

  out, logsumexp = checkpoint_name(
    jax.lax.map(rows, (q, query, _seen(query, key, window))), stack.ATTENTION
  )
  return out, (q, k, v, query, key, out, logsumexp)


def _flash_backward(window, kept, d_out):
  q, k, v, query, key, out, logsumexp = kept
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def rows(sums, block):
    q_BMRH, query, seen_R, out_BMRH, logsumexp_BMR, d_out_BMRH = block
    # The mean of d_weights_BMRY under the row's weights.
    mean_BMR = dot('BMRH,BMRH->BMR', d_out_BMRH, out_BMRH)

    def add(carry, block, masked):
      dq_BMRH, dk_BMYH, dv_BMYH = carry
      k_BMYH, v_BMYH, key = block
      logits_BMRY = _logits(q_BMRH, k_BMYH, query, key, window, masked)
      weights_BMRY = jnp.exp(logits_BMRY - logsumexp_BMR[..., None])
      d_weights_BMRY = dot('BMRH,BMYH->BMRY', d_out_BMRH, v_BMYH)
      d_logits_BMRY = weights_BMRY * (d_weights_BMRY - mean_BMR[..., None])
      d_logits_BMRY *= q_BMRH.shape[-1] ** -0.5
      weights_BMRY = weights_BMRY.astype(v_BMYH.dtype)
      d_logits_BMRY = d_logits_BMRY.astype(k_BMYH.dtype)
      return (
        dq_BMRH + dot('BMRY,BMYH->BMRH', d_logits_BMRY, k_BMYH),
        dk_BMYH + dot('BMRY,BMRH->BMYH', d_logits_BMRY, q_BMRH),
        dv_BMYH + dot('BMRY,BMRH->BMYH', weights_BMRY, d_out_BMRH),
      )

    def step(dq_BMRH, block):
      seen, sums, *block = block
      dq_BMRH, *sums = _where_seen(seen, add, (dq_BMRH, *sums), block)
      return dq_BMRH, tuple(sums)

    dq_BMRH, sums = jax.lax.scan(
      step, jnp.zeros(q_BMRH.shape, jnp.float32), (seen_R, sums, k, v, key)
    )
    return sums, dq_BMRH.astype(q_BMRH.dtype)

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(
    rows,
    (zeros(k), zeros(v)),
    (q, query, _seen(query, key, window), out, logsumexp, d_out),
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


def triton_takes(S: int, H: int) -> bool:
  """Whether `triton_decode` can read a cache (.., S, H): blocks of 2^n."""
  return not S % TRITON_LEAST and not H & (H - 1)


def triton_decode(
  q_B1NH, k_BMSH, v_BMSH, index_B1, window: int, interpret: bool = False
) -> jax.Array:
  """The kernel in JAX's Pallas library that reads a cache, (B, 1, N, H).

  It reads each row up to its own position and not beyond, and shares a row out
  over several programs.

  Args:
    index_B1: int32; a row that stands beyond S reads nothing and gets zeros.
    interpret: run it in plain JAX, for tests on a CPU.
  """
  from jax.experimental.pallas.ops.gpu import decode_attention

  B, _, N, H = q_B1NH.shape
  M, S = k_BMSH.shape[1:3]
  block = math.gcd(S, TRITON_BLOCK)
  # The queries of a key/value head are that kernel's heads, and it has one of
  # keys and values: each head is a row of its own, nothing moves.
  rows = lambda x: x.reshape(B * M, -1, H)
  end_B = jnp.where(index_B1[:, 0] < S, index_B1[:, 0] + 1, 0)
  end_X = jnp.repeat(end_B, M)
  out_XGH = decode_attention.mqa(
    rows(q_B1NH),
    rows(k_BMSH),
    rows(v_BMSH),
    start_idx=jnp.maximum(end_X - window, 0) if window else None,
    kv_seq_len=end_X,
    block_k=block,
    k_splits=math.gcd(S // block, TRITON_SPLITS),
    interpret=interpret,
  )
  return out_XGH.reshape(B, 1, N, H)


def paged_takes(S: int, H: int, window: int) -> bool:
  """Whether `paged_decode` can read a cache (.., S, H) with such a window."""
  return not S % PAGED_LEAST and not H % LANES and not window


def paged_decode(q_B1NH, k_BMSH, v_BMSH, index_B1, window: int) -> jax.Array:
  """The kernel in JAX's Pallas library for a TPU's cache, (B, 1, N, H).

  It reads each row up to its own position and not beyond. Its pages are the
  blocks of a slot, one after the other, of each head by itself.

  Args:
    index_B1: int32; a row that stands beyond S reads nothing and gets zeros.
    window: 0; the kernel has none.
  """
  del window
  from jax.experimental.pallas.ops.tpu import paged_attention

  B, _, N, H = q_B1NH.shape
  M, S = k_BMSH.shape[1:3]
  X, page = B * M, math.gcd(S, PAGED_BLOCK)
  pages = lambda x: x.reshape(1, -1, page, H)
  end_B = jnp.where(index_B1[:, 0] < S, index_B1[:, 0] + 1, 0)
  out_XGH = paged_attention.paged_attention(
    q_B1NH.reshape(X, N // M, H) * H**-0.5,
    pages(k_BMSH),
    pages(v_BMSH),
    jnp.repeat(end_B, M),
    jnp.arange(X * S // page, dtype=jnp.int32).reshape(X, -1),
    pages_per_compute_block=1,
  )
  return out_XGH.reshape(B, 1, N, H)


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


# Keys that it reads at once, at most and at least, and programs a row at most:
# the library's own numbers.
TRITON_BLOCK, TRITON_LEAST, TRITON_SPLITS = 128, 16, 16
LANES = 128  # a TPU's registers: the kernel's blocks are multiples of it
# Keys of a page at most and at least: a tile of 16-bit values has 16 rows.
PAGED_BLOCK, PAGED_LEAST = 512, 16
KERNELS = {'cudnn': cudnn, 'splash': splash}
ATTENTION = {'blockwise': blockwise} | KERNELS
KINDS = ('dense', *ATTENTION)
