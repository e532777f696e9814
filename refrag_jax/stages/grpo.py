"""`grpo`: the policy learns which chunks to expand (paper A.1, equation 1).

Each context is encoded once and shared by its G rollouts. A rollout draws T'
chunks from the policy as it stands (theta_old); its reward is the negative
log-perplexity of the gold output under the frozen decoder. Then a few clipped
updates on that batch of rollouts.

Dimension key: B contexts, G rollouts a context, R draws (the paper's T'),
C chunks, E encoder width, X = G * B rollouts.
"""

import jax
import jax.numpy as jnp

from refrag_jax import forward
from refrag_jax.models import losses, policy
from refrag_jax.stages.stage import Stage, expansion_variants


def reward(model, params, batch, c_BCE, picks_BR) -> jax.Array:
  """Negative log-perplexity of the gold output, float32 (B,)."""
  C = c_BCE.shape[1]
  nll_BO = forward.output_nll(
    model, params, batch, c_BCE, policy.to_mask(picks_BR, C), picks_BR.shape[1]
  )
  return -losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def rollout(model, params, batch, keys_B, variant, cfg):
  """Draws and rewards G expansions a context; no gradient passes here."""
  c_BCE = forward.chunk_vectors(model, params, batch)
  score_BC = forward.policy_scores(model, params, batch, c_BCE)

  def one(keys_B):
    picks_BR = policy.sample(keys_B, score_BC, variant)
    return picks_BR, reward(model, params, batch, c_BCE, picks_BR)

  keys_BG = jax.vmap(jax.random.split, (0, None))(keys_B, cfg.num_generations)
  picks_GBR, reward_GB = jax.lax.map(one, keys_BG.T)
  old_logp_GBR = jax.vmap(policy.log_probs, (None, 0))(score_BC, picks_GBR)
  return batch | {
    'c_BCE': c_BCE,
    'picks_BGR': picks_GBR.transpose(1, 0, 2),
    'old_logp_BGR': old_logp_GBR.transpose(1, 0, 2),
    'reward_BG': reward_GB.T,
    'advantage_BG': losses.group_advantage(reward_GB.T),
  }


def loss(model, params, batch, variant, cfg):
  """Equation 1, negated, summed over contexts."""
  del variant
  score_BC = forward.policy_scores(model, params, batch, batch['c_BCE'])
  logp_BGR = jax.vmap(policy.log_probs, (None, 1), 1)(
    score_BC, batch['picks_BGR']
  )
  B, G, R = logp_BGR.shape
  loss_X, cut_X = losses.clipped_surrogate(
    logp_BGR.reshape(-1, R),
    batch['old_logp_BGR'].reshape(-1, R),
    batch['advantage_BG'].reshape(-1),
    cfg.clip_eps,
  )
  prob_BC = jax.nn.softmax(score_BC)
  entropy_B = -(prob_BC * jax.nn.log_softmax(score_BC)).sum(-1)
  C = score_BC.shape[1]
  drawn_BGC = jax.nn.one_hot(batch['picks_BGR'], C).sum(2)
  std_B = batch['reward_BG'].std(1)
  metrics = {
    'reward': batch['reward_BG'].mean(),
    'reward_std': std_B.mean(),
    'zero_std_fraction': (std_B < 1e-6).mean(),
    'clip_fraction': cut_X.mean(),
    'entropy': entropy_B.mean(),
    'expand_rate_C': drawn_BGC.mean((0, 1)),
  }
  return loss_X.reshape(B, G).mean(1).sum(), jnp.float32(B), metrics


def evaluate(model, params, batch, keys_B, variant, cfg):
  """Mean reward of G sampled rollouts a context, (B,).

  Sampled, not greedy: before training the policy is uniform, and the greedy
  choice of equal logits would be "always the first chunks".
  """
  rolled = rollout(model, params, batch, keys_B, variant, cfg)
  return rolled['reward_BG'].mean(1)


STAGE = Stage(
  predecessor='mixed',
  trainable=r'^policy/',
  loss=loss,
  evaluate=evaluate,
  prepare=rollout,
  variants=expansion_variants,
  measures='reward',
)
