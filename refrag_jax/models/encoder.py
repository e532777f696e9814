"""A RoBERTa/BERT-type encoder: each chunk's tokens to one vector c_i.

Dimension key: X chunks (batch and chunk axes folded), M encoder tokens of a
chunk, E width, N heads, H head dimension, F MLP width, V vocabulary, P
positions, D decoder width.

Paper section 2: c_i = M_enc(C_i), attention only within a chunk. Pooling is
not stated there; the first position (CLS) is ours, mean an option.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import EncoderConfig
from refrag_jax.models import layers
from refrag_jax.models.stack import stack
from refrag_jax.sharding import constrain


class EncoderBlock(nn.Module):
  """Post-norm bidirectional block with biases, exact GELU."""

  cfg: EncoderConfig

  @nn.compact
  def __call__(self, x_XME, mask_XMM):
    c = self.cfg
    E, N = c.width, c.num_heads
    H = E // N
    dense = layers.Projection
    q_XMNH = dense((E, N, H), 1, True, name='q_proj')(x_XME)
    k_XMNH = dense((E, N, H), 1, True, name='k_proj')(x_XME)
    v_XMNH = dense((E, N, H), 1, True, name='v_proj')(x_XME)
    out_XMNH = layers.attention(q_XMNH, k_XMNH, v_XMNH, mask_XMM)
    h_XME = dense((N, H, E), 2, True, name='o_proj')(out_XMNH)
    x_XME = layers.LayerNorm(c.norm_eps, name='attention_norm')(x_XME + h_XME)
    h_XMF = dense((E, c.mlp_width), 1, True, name='up_proj')(x_XME)
    h_XMF = constrain(layers.gelu(h_XMF), 'chunks', None, 'mlp')
    h_XME = dense((c.mlp_width, E), 1, True, name='down_proj')(h_XMF)
    x_XME = layers.LayerNorm(c.norm_eps, name='output_norm')(x_XME + h_XME)
    return constrain(x_XME, 'chunks', None, None), None


class Encoder(nn.Module):
  cfg: EncoderConfig
  dtype: jnp.dtype
  remat: str
  scan_layers: bool

  def __call__(self, ids_XM: jax.Array, len_X: jax.Array) -> jax.Array:
    """Encodes chunks; returns c_XE float32.

    Args:
      ids_XM: encoder tokens, CLS first, SEP last, padding behind.
      len_X: real tokens of each chunk; an absent chunk (0) gives a finite
        vector that nobody reads.
    """
    return pool(self.states(ids_XM, len_X), len_X, self.cfg.pooling)

  @nn.compact
  def states(self, ids_XM: jax.Array, len_X: jax.Array) -> jax.Array:
    """The last layer's state of every token, (X, M, E) in compute dtype.

    Arguments as in `__call__`; states at padding are finite and mean nothing.
    """
    c = self.cfg
    M = ids_XM.shape[1]
    init = nn.initializers.normal(0.02)  # as BERT; a LayerNorm follows
    word_VE = self.param(
      'word_embeddings', init, (c.vocab_size, c.width), jnp.float32
    )
    # Token types are all 0: a converter folds their one row in here.
    position_PE = self.param(
      'position_embeddings',
      init,
      (c.max_length + c.position_offset, c.width),
      jnp.float32,
    )
    position_ME = jax.lax.slice_in_dim(
      position_PE, c.position_offset, c.position_offset + M
    )
    x_XME = word_VE.astype(self.dtype)[ids_XM]
    x_XME += position_ME.astype(self.dtype)[None]
    x_XME = layers.LayerNorm(c.norm_eps, name='embeddings_norm')(x_XME)
    real_XM = jnp.arange(M)[None] < len_X[:, None]
    mask_XMM = jnp.broadcast_to(real_XM[:, None], (ids_XM.shape[0], M, M))

    blocks = stack(
      EncoderBlock,
      c.num_layers,
      self.remat,
      self.scan_layers,
      in_axes=nn.broadcast,
    )
    return blocks(c, name='layers')(x_XME, mask_XMM)[0]


def pool(states_XME: jax.Array, len_X: jax.Array, pooling: str) -> jax.Array:
  """A chunk's vector c_XE, float32: 'cls' (first position) or 'mean'."""
  x_XME = states_XME.astype(jnp.float32)
  if pooling == 'cls':
    return x_XME[:, 0]
  real_XM = jnp.arange(x_XME.shape[1])[None] < len_X[:, None]
  real_XM1 = real_XM[..., None].astype(jnp.float32)
  return (x_XME * real_XM1).sum(1) / jnp.maximum(real_XM1.sum(1), 1.0)


def take_decoder_embeddings(params: dict) -> dict:
  """Starts a fresh encoder with a trained decoder's embeddings as its own.

  For equal widths and vocabularies. Scaled to the size of the fresh ones, which
  is that of the position embeddings: a norm follows the sum of the two.
  """
  rms = lambda x: jnp.sqrt(jnp.mean(x**2))
  word_VD = params['decoder']['embed_tokens']
  fresh_VE = params['encoder']['word_embeddings']
  word_VE = word_VD * (rms(fresh_VE) / rms(word_VD))
  return params | {'encoder': params['encoder'] | {'word_embeddings': word_VE}}
