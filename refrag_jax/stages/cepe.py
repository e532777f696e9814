"""`cepe_warmup`, `cepe`, `cepe_unfrozen`: the baseline of models/cepe.py.

CEPE's own recipe (paper.md section 4; princeton-nlp/CEPE): first the same text
goes to the encoder and to the decoder, then x_{1:s} to the encoder, and the
decoder predicts the o tokens after it. Encoder and cross-attention are trained,
the decoder is frozen; `cepe_unfrozen` trains it as well, because REFRAG's is.

They see the windows of `reconstruct` and of `cpt` (data/pipeline.py), with all
of the context at every step: CEPE has no curriculum.
"""

from refrag_jax import forward
from refrag_jax.models import losses
from refrag_jax.stages.stage import Stage


def loss(model, params, batch, variant, cfg):
  del variant, cfg
  nll_BO = forward.cepe_nll(model, params, batch)
  return *losses.masked_sum(nll_BO, batch['loss_mask_BO']), {}


def evaluate(model, params, batch, keys_B, variant, cfg):
  del keys_B, variant, cfg
  nll_BO = forward.cepe_nll(model, params, batch)
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


WARMUP = Stage(
  predecessor='lm',
  trainable=r'^(encoder|cross)/',
  loss=loss,
  evaluate=evaluate,
)
CEPE = WARMUP._replace(predecessor='cepe_warmup')
UNFROZEN = CEPE._replace(trainable=r'^(encoder|cross|decoder)/')
