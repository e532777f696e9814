"""A Llama-type causal decoder over embeddings (paper section 2: unchanged).

Dimension key: B batch, T positions, S cache slots, D width, N query heads,
M key/value heads, H head dimension, F MLP width, V vocabulary, Y layers.

The decoder takes embeddings, not ids: chunk embeddings stand where tokens
would. The key/value cache is a plain pytree, in and out; slot = position,
because positions are contiguous over the compressed sequence.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import DecoderConfig
from refrag_jax.models import attention, layers
from refrag_jax.models.stack import stack
from refrag_jax.sharding import constrain


class Block(nn.Module):
  """Pre-norm attention and SwiGLU, residual each."""

  cfg: DecoderConfig
  attention: str
  cross: nn.Module | None
  lora: nn.Module | None

  @nn.compact
  def __call__(self, x_BTD, cache, angles, query, key, memory):
    c = self.cfg
    D, N, M, H = c.width, c.num_heads, c.num_kv_heads, c.head_dim

    def dense(name, x, shape, num_in=1, bias=False):
      y = layers.Projection(shape, num_in, bias, name=name)(x)
      return y if self.lora is None else self.lora(name, x, y)

    h_BTD = layers.RMSNorm(c.norm_eps, name='input_layernorm')(x_BTD)
    q_BTNH = dense('q_proj', h_BTD, (D, N, H), bias=c.qkv_bias)
    k_BTMH = dense('k_proj', h_BTD, (D, M, H), bias=c.qkv_bias)
    v_BTMH = dense('v_proj', h_BTD, (D, M, H), bias=c.qkv_bias)
    if c.qk_norm:
      q_BTNH = layers.RMSNorm(c.norm_eps, name='q_norm')(q_BTNH)
      k_BTMH = layers.RMSNorm(c.norm_eps, name='k_norm')(k_BTMH)
    q_BTNH = layers.apply_rope(q_BTNH, angles)
    k_BTMH = layers.apply_rope(k_BTMH, angles)
    # Positions are shared out; every one of them looks at all keys.
    q_BTNH = constrain(q_BTNH, 'batch', 'sequence', 'heads', None)
    k_BTMH = constrain(k_BTMH, 'batch', None, 'heads', None)
    v_BTMH = constrain(v_BTMH, 'batch', None, 'heads', None)
    if cache:  # one position more of each row
      out_BTNH, cache = attention.decode(
        self.attention, q_BTNH, k_BTMH, v_BTMH, cache, query, key,
        c.sliding_window,
      )  # fmt: skip
    else:
      out_BTNH = attention.attend(
        self.attention, q_BTNH, k_BTMH, v_BTMH, query, key, c.sliding_window
      )
      if cache is not None:  # what was read here is all of it
        cache = {'k': k_BTMH.swapaxes(1, 2), 'v': v_BTMH.swapaxes(1, 2)}
    x_BTD += dense('o_proj', out_BTNH, (N, H, D), num_in=2)
    if self.cross is not None:
      x_BTD = self.cross(x_BTD, memory)

    h_BTD = layers.RMSNorm(c.norm_eps, name='post_attention_layernorm')(x_BTD)
    gate_BTF = dense('gate_proj', h_BTD, (D, c.mlp_width))
    up_BTF = dense('up_proj', h_BTD, (D, c.mlp_width))
    h_BTF = constrain(nn.silu(gate_BTF) * up_BTF, 'batch', 'sequence', 'mlp')
    x_BTD += dense('down_proj', h_BTF, (c.mlp_width, D))
    return constrain(x_BTD, 'batch', 'sequence', None), cache


class Decoder(nn.Module):
  """Embedding, blocks, final norm and head."""

  cfg: DecoderConfig
  dtype: jnp.dtype
  remat: str
  scan_layers: bool
  attention: str  # of attention.KINDS
  # A layer between attention and MLP of every block, with parameters in a
  # group of its own: the baseline CEPE alone has one (models/cepe.py).
  cross: nn.Module | None = None
  # Likewise what is added to its projections (models/lora.py).
  lora: nn.Module | None = None

  def setup(self):
    c = self.cfg
    init = nn.initializers.normal(c.width**-0.5)
    self.embed_tokens = self.param(
      'embed_tokens', init, (c.vocab_size, c.width), jnp.float32
    )
    if not c.tie_embeddings:
      self.lm_head = self.param(
        'lm_head', init, (c.width, c.vocab_size), jnp.float32
      )
    blocks = stack(
      Block,
      c.num_layers,
      self.remat,
      self.scan_layers,
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
    )
    self.layers = blocks(c, self.attention, self.cross, self.lora)
    self.norm = layers.RMSNorm(c.norm_eps)

  def embed(self, ids_BT: jax.Array) -> jax.Array:
    """Token embeddings (B, T, D). Ids are checked on the host: JAX clamps."""
    # Rows whose vectors lie in parts would be sent around to be put together.
    table_VD = constrain(self.embed_tokens.astype(self.dtype), 'vocab', None)
    return table_VD[ids_BT]

  def head(self) -> jax.Array:
    """The output matrix, float32 (D, V)."""
    c = self.cfg
    return self.embed_tokens.T if c.tie_embeddings else self.lm_head

  def __call__(
    self,
    embeds_BTD,
    positions_BT,
    segment_ids_BT=None,
    cache=None,
    memory=None,
  ):
    """Runs the decoder.

    Args:
      embeds_BTD: what stands at each position, tokens and chunks alike.
      positions_BT: int32 rotary positions; with a cache also the slots, which
        are counted from 0.
      segment_ids_BT: packing: a position sees earlier ones of its own segment
        only; 0 is padding. None: one segment a row, padding at the end.
      cache: None; {}, to have what is read here kept; or {'k', 'v'} of that,
        (Y, B, M, S, H), to read one position more of each row (T = 1).
      memory: what `cross` reads; None without one.

    Returns:
      hidden_BTD after the final norm, and the cache with it (None without one).
    """
    c = self.cfg
    index = lambda number: jnp.arange(number, dtype=jnp.int32)[None]
    if cache:
      query = attention.Places(positions_BT)
      key = attention.Places(index(cache['k'].shape[3]))
    else:
      query = attention.Places(index(embeds_BTD.shape[1]), segment_ids_BT)
      key = query
    angles = rope_angles(c, positions_BT)
    x_BTD = constrain(embeds_BTD.astype(self.dtype), 'batch', 'sequence', None)
    x_BTD, cache = self.layers(x_BTD, cache, angles, query, key, memory)
    return self.norm(x_BTD), cache


def rope_angles(cfg: DecoderConfig, positions_BT: jax.Array):
  """The rotary angles that all blocks share, as layers.rope_angles."""
  scaling = layers.RopeScaling(
    cfg.rope_factor,
    cfg.rope_low_freq_factor,
    cfg.rope_high_freq_factor,
    cfg.rope_original_length,
  )
  return layers.rope_angles(positions_BT, cfg.head_dim, cfg.rope_theta, scaling)
