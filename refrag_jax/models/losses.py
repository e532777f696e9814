"""Losses over arrays, float32, in nats; no model in here.

Dimension key: B batch, O output slots, D width, V vocabulary, P pieces of X
output slots, G rollouts of a context, R draws.
"""

import jax
import jax.numpy as jnp

from refrag_jax.models.layers import einsum32
from refrag_jax.sharding import axis_size


def token_nll(hidden_BOD, head_DV, target_BO, block: int) -> jax.Array:
  """-log p(target), float32 (B, O), without ever holding all logits.

  Args:
    hidden_BOD: the states that predict each target.
    head_DV: the output matrix.
    target_BO: ids in [0, V); checked on the host, JAX would clamp.
    block: as in `by_pieces`.
  """

  def piece(hidden_BOD, target_BO):
    logits_BOV = _logits(hidden_BOD, head_DV)
    picked_BO = jnp.take_along_axis(logits_BOV, target_BO[..., None], 2)[..., 0]
    return jax.nn.logsumexp(logits_BOV, axis=-1) - picked_BO

  return by_pieces(piece, (hidden_BOD, target_BO), block)


def token_kl(
  hidden_BOD, teacher_BOD, head_DV, temperature: float, block: int
) -> jax.Array:
  """KL of each target's distribution from a teacher's, float32 (B, O), nats.

  Times the temperature squared, so that its gradient is of the size of the
  NLL's at any temperature (Hinton et al. 2015, section 2). The teacher has no
  gradient.

  Args:
    teacher_BOD: the states that predict the same targets there.
    block: as in `by_pieces`.
  """
  teacher_DV = jax.lax.stop_gradient(head_DV)

  def piece(hidden_BOD, teacher_BOD):
    ours, theirs = (
      jax.nn.log_softmax(_logits(hidden_BOD, head_DV) / temperature)
      for hidden_BOD, head_DV in (
        (hidden_BOD, head_DV),
        (jax.lax.stop_gradient(teacher_BOD), teacher_DV),
      )
    )
    return (jnp.exp(theirs) * (theirs - ours)).sum(-1)

  kl_BO = by_pieces(piece, (hidden_BOD, teacher_BOD), block)
  return kl_BO * temperature**2


def _logits(hidden_BOD, head_DV) -> jax.Array:
  return einsum32('BOD,DV->BOV', hidden_BOD, head_DV.astype(hidden_BOD.dtype))


def by_pieces(piece, arrays: tuple, block: int) -> jax.Array:
  """piece(*arrays), (B, O), without ever holding the logits of all targets.

  Args:
    piece: of arrays (B, X, ...), X targets of each row, to (B, X).
    arrays: each (B, O, ...).
    block: targets of each row whose logits exist at once, recomputed in the
      backward; 0 takes all at once and keeps them. Each piece holds some of
      what each device has: some of every row, of every part of it.
  """
  B, O = arrays[0].shape[:2]
  if not block or block >= O:
    return piece(*arrays)
  ways = axis_size('sequence')
  block += -block % ways

  def split(x):
    """(B, O, ...) to (P, B, X, ...)."""
    pad = ((0, 0), (0, -O % block)) + ((0, 0),) * (x.ndim - 2)
    parts = jnp.pad(x, pad).reshape(B, ways, -1, block // ways, *x.shape[2:])
    return jnp.moveaxis(parts, 2, 0).reshape(-1, B, block, *x.shape[2:])

  found_PBX = jax.lax.map(
    jax.checkpoint(lambda args: piece(*args)), tuple(map(split, arrays))
  )
  parts = found_PBX.reshape(-1, B, ways, block // ways)
  return jnp.moveaxis(parts, 0, 2).reshape(B, -1)[:, :O]


def masked_sum(nll_BO, mask_BO) -> tuple[jax.Array, jax.Array]:
  """(sum of the NLL where the mask holds, how many): accumulation adds both."""
  mask_BO = mask_BO.astype(jnp.float32)
  return (nll_BO * mask_BO).sum(), mask_BO.sum()


def masked_mean(nll_BO, mask_BO) -> jax.Array:
  """Mean NLL of each row, float32 (B,); 0 where a row has no target."""
  mask_BO = mask_BO.astype(jnp.float32)
  return (nll_BO * mask_BO).sum(-1) / jnp.maximum(mask_BO.sum(-1), 1.0)


def group_advantage(reward_BG: jax.Array) -> jax.Array:
  """(r - mean_G r) / std_G r within each context's group (paper A.1).

  A group whose rollouts all earn the same teaches nothing: its advantage is 0.
  Rewards count from the group's first, so that it is: the mean of equal numbers
  is rounded, and noise over its own deviation would be near 1.
  """
  reward_BG = reward_BG - reward_BG[:, :1]
  centred_BG = reward_BG - reward_BG.mean(1, keepdims=True)
  return centred_BG / (reward_BG.std(1, keepdims=True) + 1e-8)


def clipped_surrogate(logp_XR, old_logp_XR, advantage_X, clip_eps: float):
  """Paper A.1, equation 1: per-step ratios, mean over the T' steps.

  Returns the negated objective of each rollout (X,), to be minimised, and the
  share of its steps whose ratio the clip cut off (X,).
  """
  ratio_XR = jnp.exp(logp_XR - old_logp_XR)
  advantage_X1 = advantage_X[:, None]
  clipped_XR = jnp.clip(ratio_XR, 1 - clip_eps, 1 + clip_eps) * advantage_X1
  unclipped_XR = ratio_XR * advantage_X1
  cut_XR = clipped_XR < unclipped_XR
  loss_X = -jnp.minimum(unclipped_XR, clipped_XR).mean(-1)
  return loss_X, cut_XR.astype(jnp.float32).mean(-1)
