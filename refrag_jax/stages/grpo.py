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

from refrag_jax.config import check
from refrag_jax.config.schema import Config, StageConfig
from refrag_jax.data.tasks.windows import Continue
from refrag_jax.errors import UserError
from refrag_jax.models import losses, policy
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.context import SomeExpanded
from refrag_jax.stages.stage import Stage

# Each p is a shape of its own and so a compilation of the step.
MAX_FRACTIONS = 4


def reward(model, params, batch, c_BCE, picks_BR) -> jax.Array:
  """Negative log-perplexity of the gold output, float32 (B,)."""
  expand_BC = policy.to_mask(picks_BR, c_BCE.shape[1])
  nll_BO = model.apply(
    {'params': params},
    batch,
    c_BCE,
    expand_BC,
    picks_BR.shape[1],
    method=Refrag.output_nll,
  )
  return -losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def scores(model, params, batch, c_BCE) -> jax.Array:
  """The policy's logits, (B, C)."""
  return model.apply(
    {'params': params}, c_BCE, batch['chunk_len_BC'] > 0, method=Refrag.score
  )


def rollout(model, params, batch, keys_B, variant, cfg):
  """Draws and rewards G expansions a context; no gradient passes here."""
  c_BCE = model.apply({'params': params}, batch, method=Refrag.chunk_embeddings)
  score_BC = scores(model, params, batch, c_BCE)

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


class Grpo(Stage):
  """Its loss is equation 1 over rollouts, not the NLL of targets."""

  def loss(self, model, params, batch, variant, cfg: StageConfig):
    """Equation 1, negated, summed over contexts."""
    del variant
    score_BC = scores(model, params, batch, batch['c_BCE'])
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

  def evaluate(self, model, params, batch, keys_B, variant, cfg: StageConfig):
    """Mean reward of G sampled rollouts a context, (B,).

    Sampled, not greedy: before training the policy is uniform, and the greedy
    choice of equal logits would be "always the first chunks".
    """
    rolled = self.prepare(model, params, batch, keys_B, variant, cfg)
    return rolled['reward_BG'].mean(1)

  def check(self, config: Config) -> None:
    """Refuses groups and shares that GRPO cannot compare."""
    super().check(config)
    cfg, prefix = config.stage[self.name], f'stage.{self.name}.'
    if len(cfg.expand_fractions) > MAX_FRACTIONS:
      raise UserError(
        f'config.{prefix}expand_fractions has {len(cfg.expand_fractions)} '
        f'values: use at most {MAX_FRACTIONS}, each is compiled on its own'
      )
    if cfg.num_generations < 2:
      raise UserError(
        f'config.{prefix}num_generations is {cfg.num_generations}: an '
        'advantage compares the samples of a group, use 2 or more, such as 8'
      )
    check.positive(cfg, prefix, 'clip_eps', 'updates_per_rollout')

  def check_updates(self, cfg: StageConfig, prefix: str) -> None:
    """Several updates on one batch of rollouts are what it is for."""


GRPO = Grpo(
  name='grpo',
  predecessor='mixed',
  trainable=r'^policy/',
  task=Continue(),
  nll=None,
  context=SomeExpanded(),
  prepare=rollout,
  measures='reward',
  score=scores,
)
