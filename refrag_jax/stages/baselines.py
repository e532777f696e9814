"""What REFRAG is held against: control arms, and the baseline CEPE.

Control arms are the same continued training without compression. The paper's
tables lack them: its REFRAG decoder is trained further on the evaluation's
domains (page 5), its LLaMA rows are not. Here one decoder sees the
same windows in the same order at the same learning rate for the same target
tokens, its context given as tokens: nothing, the last tokens at REFRAG's
length, or all of it, in equal shares over the steps.

CEPE (models/cepe.py) has the recipe of its authors (Yen et al. 2024;
princeton-nlp/CEPE): first the same text goes to the encoder and to the decoder,
then x_{1:s} to the encoder, and the decoder predicts the o tokens after it.
Encoder and cross-attention are trained, the decoder is frozen; `cepe_unfrozen`
trains it as well, because REFRAG's is. All of the context at every step: CEPE
has no curriculum.
"""

import dataclasses

from refrag_jax.data.tasks.questions import Questions
from refrag_jax.data.tasks.windows import Continue, Regenerate
from refrag_jax.models.cepe import Cepe
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.context import Nothing, Tokens
from refrag_jax.stages.stage import Stage


def plain_nll(model, params, batch, variant):
  """NLL of the outputs by the decoder alone, (B, O), and the loss mask."""
  nll_BO = model.apply(
    {'params': params}, batch, variant, method=Refrag.plain_nll
  )
  return nll_BO, batch['loss_mask_BO']


def cepe_nll(model, params, batch, variant):
  """NLL of the outputs by CEPE over the same parameters, (B, O), and mask."""
  del variant
  nll_BO = Cepe(model.cfg).apply(
    {'params': params}, batch, method=Cepe.output_nll
  )
  return nll_BO, batch['loss_mask_BO']


CPT_TRAINED = Stage(
  name='cpt_trained',
  predecessor='lm',
  trainable=r'^(decoder|lora)/',
  task=Continue(),
  nll=plain_nll,
  context=Tokens(),
  mirrors='cpt',
)
MIXED_TRAINED = dataclasses.replace(
  CPT_TRAINED,
  name='mixed_trained',
  predecessor='cpt_trained',
  mirrors='mixed',
)
# Passages end in ragged chunks, of which "as many last tokens as chunks" is not
# defined.
SFT_FULL = dataclasses.replace(
  MIXED_TRAINED,
  name='sft_full',
  predecessor='mixed_trained',
  task=Questions(),
  context=Tokens(('none', 'full')),
  mirrors='sft',
)
SFT_NONE = dataclasses.replace(SFT_FULL, name='sft_none')

CEPE_WARMUP = Stage(
  name='cepe_warmup',
  predecessor='lm',
  trainable=r'^(encoder|cross)/',
  task=Regenerate(pieces=True),
  nll=cepe_nll,
  context=Nothing(),
  mirrors='reconstruct',
)
CEPE = dataclasses.replace(
  CEPE_WARMUP,
  name='cepe',
  predecessor='cepe_warmup',
  task=Continue(pieces=True),
  mirrors='cpt',
)
CEPE_UNFROZEN = dataclasses.replace(
  CEPE, name='cepe_unfrozen', trainable=r'^(encoder|cross|decoder)/'
)
