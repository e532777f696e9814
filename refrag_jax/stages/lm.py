"""`lm`: next-token pre-training of the decoder, for runs from scratch.

Dimension key: B rows, T positions.
"""

from refrag_jax.models import losses
from refrag_jax.stages.stage import Stage


def nll(model, params, batch):
  """NLL of each next token within its segment, (B, T-1), and its mask."""
  variables = {'params': params}
  tokens_BT, segment_ids_BT = batch['tokens_BT'], batch['segment_ids_BT']
  hidden_BTD = model.apply(
    variables, tokens_BT, batch['positions_BT'], segment_ids_BT, method='lm'
  )
  head_DV = model.apply(variables, method='head')
  nll_BT = losses.token_nll(
    hidden_BTD[:, :-1], head_DV, tokens_BT[:, 1:], model.cfg.loss_block
  )
  mask_BT = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (
    segment_ids_BT[:, 1:] > 0
  )
  return nll_BT, mask_BT


def loss(model, params, batch, variant, cfg):
  del variant, cfg
  return *losses.masked_sum(*nll(model, params, batch)), {}


def evaluate(model, params, batch, keys_B, variant, cfg):
  del keys_B, variant, cfg
  return losses.masked_mean(*nll(model, params, batch))


STAGE = Stage(
  predecessor=None, trainable=r'^decoder/', loss=loss, evaluate=evaluate
)
