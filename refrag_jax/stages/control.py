"""Control arms: the same continued training without compression.

The paper's tables lack them (paper.md section 7.11): its REFRAG decoder is
trained further on the evaluation's domains, its LLaMA rows are not. Here one
decoder sees the same windows in the same order at the same learning rate for
the same target tokens, its context given as tokens: nothing, the last tokens at
REFRAG's length, or all of it, in equal shares over the steps.
"""

from refrag_jax import forward
from refrag_jax.models import losses
from refrag_jax.stages.stage import Stage


def loss(model, params, batch, variant, cfg):
  del cfg
  nll_BO = forward.plain_nll(model, params, batch, variant)
  return *losses.masked_sum(nll_BO, batch['loss_mask_BO']), {}


def evaluate(model, params, batch, keys_B, variant, cfg):
  del keys_B, cfg
  nll_BO = forward.plain_nll(model, params, batch, variant)
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def contexts(cfg, num_chunks: int) -> tuple[str, ...]:
  del num_chunks
  return cfg.contexts


def control(predecessor: str) -> Stage:
  return Stage(
    predecessor=predecessor,
    trainable=r'^decoder/',
    loss=loss,
    evaluate=evaluate,
    variants=contexts,
  )
