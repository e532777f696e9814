"""g_theta: one logit per chunk, which ones to expand (paper A.1).

Dimension key: B batch, C chunks (the paper's L), E encoder width, N heads,
H head dimension, F MLP width, R draws (the paper's T'), G rollouts.

"Two-layer transformer over the c_i" is all that the paper says. Pre-norm,
GELU, rotary positions over the chunk index and the zero start are ours: without
positions the policy cannot tell which chunk stands nearest to the output, and
a zero last layer starts it as the uniform choice.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import PolicyConfig
from refrag_jax.models import layers

NEG = -1e30


class PolicyBlock(nn.Module):
  cfg: PolicyConfig

  @nn.compact
  def __call__(self, x_BCE, angles, mask_BCC):
    c = self.cfg
    E, N = x_BCE.shape[-1], c.num_heads
    H = E // N
    dense = layers.Projection
    h_BCE = layers.LayerNorm(c.norm_eps, name='attention_norm')(x_BCE)
    q_BCNH = dense((E, N, H), 1, True, name='q_proj')(h_BCE)
    k_BCNH = dense((E, N, H), 1, True, name='k_proj')(h_BCE)
    v_BCNH = dense((E, N, H), 1, True, name='v_proj')(h_BCE)
    if c.positions:
      q_BCNH = layers.apply_rope(q_BCNH, angles)
      k_BCNH = layers.apply_rope(k_BCNH, angles)
    out_BCNH = layers.attention(q_BCNH, k_BCNH, v_BCNH, mask_BCC)
    x_BCE += dense((N, H, E), 2, True, name='o_proj')(out_BCNH)
    h_BCE = layers.LayerNorm(c.norm_eps, name='mlp_norm')(x_BCE)
    h_BCF = dense((E, c.mlp_width), 1, True, name='up_proj')(h_BCE)
    h_BCF = layers.gelu(h_BCF)
    return x_BCE + dense((c.mlp_width, E), 1, True, name='down_proj')(h_BCF)


class Policy(nn.Module):
  cfg: PolicyConfig

  @nn.compact
  def __call__(self, c_BCE: jax.Array, valid_BC: jax.Array) -> jax.Array:
    """Logits s_BC, float32; NEG where there is no chunk."""
    c = self.cfg
    B, C, E = c_BCE.shape
    positions_BC = jnp.broadcast_to(jnp.arange(C)[None], (B, C))
    angles = layers.rope_angles(positions_BC, E // c.num_heads, c.rope_theta)
    mask_BCC = jnp.broadcast_to(valid_BC[:, None], (B, C, C))
    x_BCE = c_BCE
    for i in range(c.num_layers):
      x_BCE = PolicyBlock(c, name=f'layers_{i}')(x_BCE, angles, mask_BCC)
    x_BCE = layers.LayerNorm(c.norm_eps, name='norm')(x_BCE)
    score_BC1 = layers.Projection(
      (E, 1), 1, False, nn.initializers.zeros, name='score'
    )(x_BCE)
    return jnp.where(valid_BC, score_BC1[..., 0], NEG)


def sample(keys_B: jax.Array, score_BC: jax.Array, draws: int) -> jax.Array:
  """T' chunks without replacement, in the order drawn: int32 picks_BR.

  Each row draws by its own key, so what it draws does not depend on which rows
  are computed with it.

  Gumbel top-T' is exactly the paper's sequential masked softmax: the largest
  perturbed logit is a softmax draw, the next largest a draw from what remains.
  """
  C = score_BC.shape[1]
  gumbel_BC = jax.vmap(lambda key: jax.random.gumbel(key, (C,), jnp.float32))(
    keys_B
  )
  return jax.lax.top_k(score_BC + gumbel_BC, draws)[1]


def greedy(score_BC: jax.Array, draws: int) -> jax.Array:
  """The chunks of the T' highest logits, int (B, T'): the policy's mode."""
  return jax.lax.top_k(score_BC, draws)[1]


def log_probs(score_BC: jax.Array, picks_BR: jax.Array) -> jax.Array:
  """Log pi(l_t | x, l_<t) for each draw t, float32 (B, R); paper A.1.

  s_i - logsumexp over the chunks not drawn before t.
  """
  C = score_BC.shape[1]
  drawn_BRC = jax.nn.one_hot(picks_BR, C, dtype=jnp.float32)
  before_BRC = jnp.cumsum(drawn_BRC, 1) - drawn_BRC
  remaining_BRC = jnp.where(before_BRC > 0, NEG, score_BC[:, None])
  picked_BR = jnp.take_along_axis(score_BC, picks_BR, 1)
  return picked_BR - jax.nn.logsumexp(remaining_BRC, -1)


def to_mask(picks_BR: jax.Array, chunks: int) -> jax.Array:
  """The expansion mask of a set of draws, bool (B, C)."""
  return jax.nn.one_hot(picks_BR, chunks, dtype=jnp.int32).sum(1) > 0
