"""`mlm`: masked-language pre-training of the encoder, for runs from scratch.

The paper's encoder is RoBERTa, so pre-trained. Here it learns from the same
windows of text in two forms: whole, up to its `max_length`, and cut into the
chunks that it will have to read (data/masked.py).

The head is the transpose of the word embeddings right behind the last layer:
RoBERTa's has a dense layer and a norm between, which would be parameters of no
other use. So the stage trains nothing beyond the group `encoder`.

It follows `lm` because every checkpoint holds all groups; it reads no decoder.
`reconstruct` starts from it where stage.reconstruct.init_from says so.

Dimension key: B windows, C chunks, M encoder tokens of a chunk or window, E
encoder width, V its vocabulary, X texts to encode, T tokens of a row.
"""

import jax.numpy as jnp

from refrag_jax.data.tasks.windows import Masked
from refrag_jax.models import losses
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.context import Nothing
from refrag_jax.stages.stage import Stage


def nll(model, params, batch, variant):
  """NLL of every token of each window in both forms, (B, T), and its mask."""
  del variant
  B, C, M = batch['encoder_BCM'].shape
  parts = (
    (batch['whole_BM'], batch['whole_len_B'], batch['whole_target_BM']),
    (
      batch['encoder_BCM'].reshape(B * C, M),
      batch['encoder_len_BC'].reshape(B * C),
      batch['encoder_target_BCM'].reshape(B * C, M),
    ),
  )
  head_EV = params['encoder']['word_embeddings'].T
  nlls, masks = [], []
  for ids_XM, len_X, target_XM in parts:
    states_XME = model.apply(
      {'params': params}, ids_XM, len_X, method=Refrag.encoder_states
    )
    nll_XM = losses.token_nll(
      states_XME, head_EV, jnp.maximum(target_XM, 0), model.cfg.loss_block
    )
    nlls.append(nll_XM.reshape(B, -1))
    masks.append((target_XM >= 0).reshape(B, -1))
  return jnp.concatenate(nlls, 1), jnp.concatenate(masks, 1)


MLM = Stage(
  name='mlm',
  predecessor='lm',
  trainable=r'^encoder/',
  task=Masked(),
  nll=nll,
  context=Nothing(),
)
