"""phi: encoder space to decoder space, e_i = phi(c_i) (paper section 2, B.2).

Dimension key: X chunks, E encoder width, D decoder width.

The paper gives two layers with hidden = output = decoder width; GELU and
biases are ours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.models import layers


class ChunkProjection(nn.Module):
  width: int  # decoder width D

  @nn.compact
  def __call__(self, c_XE: jax.Array) -> jax.Array:
    D = self.width
    h_XD = layers.Projection((c_XE.shape[-1], D), 1, True, name='up_proj')(c_XE)
    h_XD = layers.gelu(h_XD)
    return layers.Projection((D, D), 1, True, name='down_proj')(h_XD)


def match_embedding_scale(params: dict) -> dict:
  """Scales a fresh phi so that ||e_i|| is near a token embedding's norm.

  c_i leaves a LayerNorm with unit variance, a fan-in-normal layer keeps it, and
  E[gelu(z)^2] = 0.425 for z ~ N(0, 1): so the last kernel's gain is what sets
  ||e_i||. An embedding ten times longer than any token would drown the others
  in the decoder's residual stream.
  """
  rms = jnp.sqrt(jnp.mean(params['decoder']['embed_tokens'] ** 2))
  down = params['projection']['down_proj']
  gain = jnp.sqrt(
    jnp.mean(down['kernel'] ** 2) * down['kernel'].shape[0] * 0.425
  )
  down = down | {'kernel': down['kernel'] * (rms / gain)}
  return params | {'projection': params['projection'] | {'down_proj': down}}
