"""`lm`: next-token pre-training of the decoder, for runs from scratch."""

from refrag_jax.data.tasks.rows import PackedRows
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.context import Nothing
from refrag_jax.stages.stage import Stage


def nll(model, params, batch, variant):
  del variant
  return model.apply({'params': params}, batch, method=Refrag.next_token_nll)


LM = Stage(
  name='lm',
  predecessor=None,
  trainable=r'^decoder/',
  task=PackedRows(),
  nll=nll,
  context=Nothing(),
)
