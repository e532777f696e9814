"""`reconstruct`, `cpt`, `mixed` and `sft`: one loss, four uses (paper 2).

They differ in the task, in what is trained, and in whether some chunks stay
tokens:

  reconstruct  decoder frozen; regenerate x_{1:s} from its chunk embeddings
  cpt          next paragraph x_{s+1:s+o} from the chunk embeddings of x_{1:s}
  mixed        as cpt, floor(pL) random chunks left as tokens
  sft          answer after a question and retrieved passages

All but the first may learn beside their targets from what the same decoder says
of them with the context as tokens: distillation, which the paper has not.

Dimension key: B batch, C chunks, O output slots, D decoder width.
"""

import dataclasses

import jax.numpy as jnp

from refrag_jax.config import check
from refrag_jax.config.schema import Config, StageConfig
from refrag_jax.data.tasks.questions import Questions
from refrag_jax.data.tasks.windows import Continue, Regenerate
from refrag_jax.errors import UserError
from refrag_jax.models import losses, policy
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.context import SomeExpanded
from refrag_jax.stages.mlm import MLM
from refrag_jax.stages.stage import Stage, as_is

ALL_BUT_POLICY = r'^(encoder|projection|decoder|lora)/'


def nll(model, params, batch, variant):
  """NLL of the outputs with nothing expanded, (B, O), and the loss mask."""
  del variant
  nll_BO = model.apply({'params': params}, batch, method=Refrag.compressed_nll)
  return nll_BO, batch['loss_mask_BO']


def expand_random(model, params, batch, keys_B, variant, cfg):
  """Marks `variant` chunks of each row, uniformly without replacement."""
  del model, params, cfg
  uniform_BC = jnp.where(batch['chunk_len_BC'] > 0, 0.0, policy.NEG)
  picks_BR = policy.sample(keys_B, uniform_BC, variant)
  expand_BC = policy.to_mask(picks_BR, uniform_BC.shape[1])
  return batch | {'expand_BC': expand_BC}


def mixed_nll(model, params, batch, variant):
  """As `nll`, with the marked chunks as tokens."""
  nll_BO = model.apply(
    {'params': params}, batch, variant, method=Refrag.mixed_nll
  )
  return nll_BO, batch['loss_mask_BO']


def with_teacher(prepare):
  """A `prepare` that adds the teacher's states, (B, O, D), where there is one.

  It is outside of the gradient. The teacher reads all of the context as tokens,
  without adapters, so that it stays what it was.
  """

  def prepared(model, params, batch, keys_B, variant, cfg):
    batch = prepare(model, params, batch, keys_B, variant, cfg)
    if not cfg.distill_weight:
      return batch
    return batch | {'teacher_BOD': _teacher(model, params, batch)}

  return prepared


def _teacher(model, params, batch):
  cfg = dataclasses.replace(
    model.cfg, lora=dataclasses.replace(model.cfg.lora, rank=0)
  )
  plain = {group: x for group, x in params.items() if group != 'lora'}
  return Refrag(cfg).apply(
    {'params': plain}, batch, 'full', method=Refrag.plain_states
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Distilled(Stage):
  """A stage whose loss may have a teacher's part; `prepare` has to bring it."""

  def loss(self, model, params, batch, variant, cfg: StageConfig):
    """NLL, plus the weighted KL from the teacher where there is one."""
    if not cfg.distill_weight:
      return super().loss(model, params, batch, variant, cfg)
    nll_BO, kl_BO = model.apply(
      {'params': params},
      batch,
      variant or 0,
      cfg.distill_temperature,
      method=Refrag.distilled,
    )
    mask_BO = batch['loss_mask_BO']
    nll, targets = losses.masked_sum(nll_BO, mask_BO)
    kl, _ = losses.masked_sum(kl_BO, mask_BO)
    total = nll + cfg.distill_weight * kl
    return total, targets, {'distill_kl': kl / jnp.maximum(targets, 1.0)}

  def longest(self, config: Config) -> int:
    """Positions of the longest sequence, the teacher's included."""
    cfg, k = config.stage[self.name], config.model.chunk_size
    longest = super().longest(config)
    if cfg.distill_weight:
      chunks = self.task.num_chunks(config, self.name)
      longest += chunks * k - self.context.positions(cfg, chunks, k)
    return longest

  def check_distillation(self, cfg: StageConfig, prefix: str) -> None:
    """Refuses a weight below 0, and a temperature that is not above it."""
    check.not_negative(cfg, prefix, 'distill_weight')
    if cfg.distill_weight:
      check.positive(cfg, prefix, 'distill_temperature')


class Reconstruct(Stage):
  """The first stage that trains an encoder with this decoder."""

  def check(self, config: Config) -> None:
    """Refuses an encoder from `mlm` that it would not start from."""
    super().check(config)
    before = config.stages[: config.stages.index(self.name)]
    if MLM.name in before and not config.stage[self.name].init_from:
      raise UserError(
        f'config.stages has mlm before {self.name}, which would start from lm '
        f'all the same: set config.stage.{self.name}.init_from to @RUN/mlm, '
        "RUN being the workdir's last name, or to WORKDIR/checkpoints/mlm"
      )


RECONSTRUCT = Reconstruct(
  name='reconstruct',
  predecessor='lm',
  trainable=r'^(encoder|projection)/',
  task=Regenerate(),
  nll=nll,
)
# A decoder that is too small to write what it has only read as vectors.
RECONSTRUCT_UNFROZEN = dataclasses.replace(
  RECONSTRUCT,
  name='reconstruct_unfrozen',
  trainable=ALL_BUT_POLICY,
  mirrors='reconstruct',
)
CPT = Distilled(
  name='cpt',
  predecessor='reconstruct',
  trainable=ALL_BUT_POLICY,
  task=Continue(),
  nll=nll,
  prepare=with_teacher(as_is),
)
# What an encoder alone can do for a decoder that stays as it is.
CPT_FROZEN = dataclasses.replace(
  CPT, name='cpt_frozen', trainable=RECONSTRUCT.trainable, mirrors='cpt'
)
MIXED = Distilled(
  name='mixed',
  predecessor='cpt',
  trainable=ALL_BUT_POLICY,
  task=Continue(),
  nll=mixed_nll,
  context=SomeExpanded(),
  prepare=with_teacher(expand_random),
)
SFT = Distilled(
  name='sft',
  predecessor='mixed',
  trainable=ALL_BUT_POLICY,
  task=Questions(),
  nll=nll,
  prepare=with_teacher(as_is),
)
