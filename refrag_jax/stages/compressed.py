"""`reconstruct`, `cpt`, `mixed` and `sft`: one loss, four uses (paper 2).

They differ in the batch (data/pipeline.py), in what is trained, and in whether
some chunks stay tokens:

  reconstruct  decoder frozen; regenerate x_{1:s} from its chunk embeddings
  cpt          next paragraph x_{s+1:s+o} from the chunk embeddings of x_{1:s}
  mixed        as cpt, floor(pL) random chunks left as tokens
  sft          answer after a question and retrieved passages

Dimension key: B batch, C chunks, O output slots.
"""

import jax.numpy as jnp

from refrag_jax import forward
from refrag_jax.models import losses, policy
from refrag_jax.stages.stage import Stage, expansion_variants

ALL_BUT_POLICY = r'^(encoder|projection|decoder)/'


def loss(model, params, batch, variant, cfg):
  del variant, cfg
  nll_BO = forward.compressed_nll(model, params, batch)
  return *losses.masked_sum(nll_BO, batch['loss_mask_BO']), {}


def evaluate(model, params, batch, keys_B, variant, cfg):
  del keys_B, variant, cfg
  nll_BO = forward.compressed_nll(model, params, batch)
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def expand_random(model, params, batch, keys_B, variant, cfg):
  """Marks `variant` chunks of each row, uniformly without replacement."""
  del model, params, cfg
  uniform_BC = jnp.where(batch['chunk_len_BC'] > 0, 0.0, policy.NEG)
  picks_BR = policy.sample(keys_B, uniform_BC, variant)
  expand_BC = policy.to_mask(picks_BR, uniform_BC.shape[1])
  return batch | {'expand_BC': expand_BC}


def mixed_nll(model, params, batch, variant):
  c_BCE = forward.chunk_vectors(model, params, batch)
  return forward.output_nll(
    model, params, batch, c_BCE, batch['expand_BC'], variant
  )


def mixed_loss(model, params, batch, variant, cfg):
  del cfg
  nll_BO = mixed_nll(model, params, batch, variant)
  return *losses.masked_sum(nll_BO, batch['loss_mask_BO']), {}


def mixed_evaluate(model, params, batch, keys_B, variant, cfg):
  batch = expand_random(model, params, batch, keys_B, variant, cfg)
  nll_BO = mixed_nll(model, params, batch, variant)
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


RECONSTRUCT = Stage(
  predecessor='lm',
  trainable=r'^(encoder|projection)/',
  loss=loss,
  evaluate=evaluate,
)
# A decoder that is too small to write what it has only read as vectors.
RECONSTRUCT_UNFROZEN = RECONSTRUCT._replace(trainable=ALL_BUT_POLICY)
CPT = Stage(
  predecessor='reconstruct',
  trainable=ALL_BUT_POLICY,
  loss=loss,
  evaluate=evaluate,
)
# What an encoder alone can do for a decoder that stays as it is.
CPT_FROZEN = CPT._replace(trainable=RECONSTRUCT.trainable)
MIXED = Stage(
  predecessor='cpt',
  trainable=ALL_BUT_POLICY,
  loss=mixed_loss,
  evaluate=mixed_evaluate,
  prepare=expand_random,
  variants=expansion_variants,
)
SFT = Stage(
  predecessor='mixed',
  trainable=ALL_BUT_POLICY,
  loss=loss,
  evaluate=evaluate,
)
