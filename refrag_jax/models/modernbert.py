"""ModernBERT: an encoder with rotary positions, gated MLPs and local layers.

Dimension key: X chunks (batch and chunk axes folded), M encoder tokens of a
chunk, E width, N heads, H head dimension, F MLP width, V vocabulary, Y layers.

Pre-norm, without biases; the first block has no norm before its attention.
Every global_every-th layer from the first on sees the whole text, the others
local_window tokens to each side, each kind with a rotary base of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import EncoderConfig
from refrag_jax.models import layers
from refrag_jax.models.encoder import Encoder
from refrag_jax.models.stack import stack
from refrag_jax.sharding import constrain


class ModernBertBlock(nn.Module):
  """Pre-norm bidirectional block with a gated exact GELU."""

  cfg: EncoderConfig

  @nn.compact
  def __call__(self, x_XME, layer, near_XMM, real_XMM, angles, local_angles):
    c = self.cfg
    E, N = c.width, c.num_heads
    H = E // N
    dense = layers.Projection
    norm = lambda name: layers.LayerNorm(c.norm_eps, use_bias=False, name=name)
    h_XME = norm('attention_norm')(x_XME)
    h_XME = jnp.where(layer == 0, x_XME, h_XME)
    q_XMNH = dense((E, N, H), 1, False, name='q_proj')(h_XME)
    k_XMNH = dense((E, N, H), 1, False, name='k_proj')(h_XME)
    v_XMNH = dense((E, N, H), 1, False, name='v_proj')(h_XME)
    whole = layer % c.global_every == 0
    angles = jax.tree.map(
      lambda a, b: jnp.where(whole, a, b), angles, local_angles
    )
    q_XMNH = layers.apply_rope(q_XMNH, angles)
    k_XMNH = layers.apply_rope(k_XMNH, angles)
    mask_XMM = real_XMM & (whole | near_XMM)
    out_XMNH = layers.attention(q_XMNH, k_XMNH, v_XMNH, mask_XMM)
    x_XME += dense((N, H, E), 2, False, name='o_proj')(out_XMNH)

    h_XME = norm('mlp_norm')(x_XME)
    gate_XMF = dense((E, c.mlp_width), 1, False, name='gate_proj')(h_XME)
    up_XMF = dense((E, c.mlp_width), 1, False, name='up_proj')(h_XME)
    h_XMF = layers.gelu(gate_XMF) * up_XMF
    h_XMF = constrain(h_XMF, 'chunks', None, 'mlp')
    x_XME += dense((c.mlp_width, E), 1, False, name='down_proj')(h_XMF)
    return constrain(x_XME, 'chunks', None, None), None


class ModernBert(Encoder):
  """Called as `Encoder` is."""

  @nn.compact
  def states(self, ids_XM: jax.Array, len_X: jax.Array) -> jax.Array:
    """The last layer's state of every token, (X, M, E) in compute dtype."""
    c = self.cfg
    X, M = ids_XM.shape
    word_VE = self.param(
      'word_embeddings',
      nn.initializers.normal(0.02),
      (c.vocab_size, c.width),
      jnp.float32,
    )
    norm = lambda name: layers.LayerNorm(c.norm_eps, use_bias=False, name=name)
    x_XME = norm('embeddings_norm')(word_VE.astype(self.dtype)[ids_XM])
    place_M = jnp.arange(M)
    real_XM = place_M[None] < len_X[:, None]
    real_XMM = jnp.broadcast_to(real_XM[:, None], (X, M, M))
    apart_MM = jnp.abs(place_M[:, None] - place_M[None])
    near_XMM = (apart_MM <= c.local_window)[None]
    angles, local_angles = (
      layers.rope_angles(place_M[None], c.width // c.num_heads, theta)
      for theta in (c.rope_theta, c.local_rope_theta)
    )
    blocks = stack(
      ModernBertBlock,
      c.num_layers,
      self.remat,
      self.scan_layers,
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
    )
    x_XME, _ = blocks(c, name='layers')(
      x_XME, jnp.arange(c.num_layers), near_XMM, real_XMM, angles, local_angles
    )
    return norm('final_norm')(x_XME)
