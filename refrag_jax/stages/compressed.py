"""`reconstruct`, `cpt`, `mixed` and `sft`: one loss, four uses (paper 2).

They differ in the task, in what is trained, and in whether some chunks stay
tokens:

  reconstruct  decoder frozen; regenerate x_{1:s} from its chunk embeddings
  cpt          next paragraph x_{s+1:s+o} from the chunk embeddings of x_{1:s}
  mixed        as cpt, floor(pL) random chunks left as tokens
  sft          answer after a question and retrieved passages

Dimension key: B batch, C chunks, O output slots.
"""

import dataclasses

import jax.numpy as jnp

from refrag_jax.config.schema import Config
from refrag_jax.data.tasks.questions import Questions
from refrag_jax.data.tasks.windows import Continue, Regenerate
from refrag_jax.errors import UserError
from refrag_jax.models import policy
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.context import SomeExpanded
from refrag_jax.stages.mlm import MLM
from refrag_jax.stages.stage import Stage

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
CPT = Stage(
  name='cpt',
  predecessor='reconstruct',
  trainable=ALL_BUT_POLICY,
  task=Continue(),
  nll=nll,
)
# What an encoder alone can do for a decoder that stays as it is.
CPT_FROZEN = dataclasses.replace(
  CPT, name='cpt_frozen', trainable=RECONSTRUCT.trainable, mirrors='cpt'
)
MIXED = Stage(
  name='mixed',
  predecessor='cpt',
  trainable=ALL_BUT_POLICY,
  task=Continue(),
  nll=mixed_nll,
  context=SomeExpanded(),
  prepare=expand_random,
)
SFT = Stage(
  name='sft',
  predecessor='mixed',
  trainable=ALL_BUT_POLICY,
  task=Questions(),
  nll=nll,
)
