"""The pure functions of (params, batch) that stages and evals share.

Dimension key: B batch, C chunks (the paper's L), K chunk size (k), P pieces, M
encoder tokens of one, O output slots, E encoder width, D decoder width, W last
tokens kept.
"""

import jax
import jax.numpy as jnp

from refrag_jax.models import losses
from refrag_jax.models.cepe import Cepe
from refrag_jax.models.refrag import Refrag


def chunk_vectors(model: Refrag, params, batch) -> jax.Array:
  """c_i of every chunk, (B, C, E): what can be cached."""
  return model.apply(
    {'params': params},
    batch['encoder_BCM'],
    batch['encoder_len_BC'],
    method='encode',
  )


def policy_scores(model: Refrag, params, batch, c_BCE) -> jax.Array:
  """The policy's logits s_BC."""
  return model.apply(
    {'params': params}, c_BCE, batch['chunk_len_BC'] > 0, method='score'
  )


def output_nll(
  model: Refrag, params, batch, c_BCE, expand_BC, num_expanded: int
) -> jax.Array:
  """NLL of every output token given the (partly expanded) context, (B, O).

  Args:
    c_BCE: chunk vectors before the projection; None with every chunk expanded.
    expand_BC: chunks that stay tokens, at most `num_expanded` (static) a row.
  """
  hidden_BOD = output_states(
    model, params, batch, c_BCE, expand_BC, num_expanded
  )
  head_DV = model.apply({'params': params}, method='head')
  return losses.token_nll(
    hidden_BOD, head_DV, batch['output_BO'], model.cfg.loss_block
  )


def output_states(
  model: Refrag, params, batch, c_BCE, expand_BC, num_expanded: int
) -> jax.Array:
  """The states that predict the outputs, (B, O, D); as `output_nll`."""
  variables = {'params': params}
  e_BCD = None
  if c_BCE is not None:
    e_BCD = model.apply(variables, c_BCE, method='project')
  return model.apply(
    variables, batch, e_BCD, expand_BC, num_expanded, method='decode'
  )


def compressed_nll(model: Refrag, params, batch) -> jax.Array:
  """Encoder to loss with nothing expanded, (B, O)."""
  c_BCE = chunk_vectors(model, params, batch)
  none_BC = jnp.zeros(c_BCE.shape[:2], bool)
  return output_nll(model, params, batch, c_BCE, none_BC, 0)


def plain_nll(model: Refrag, params, batch, context: str) -> jax.Array:
  """The decoder alone, (B, O): 'none', 'last_k' or 'full' context as tokens.

  'last_k' keeps as many last context tokens as REFRAG has chunk positions
  (LLaMA_K of the paper's Table 1); contexts without ragged chunks only.
  """
  chunks_BCK, len_BC = batch['chunks_BCK'], batch['chunk_len_BC']
  B, C, K = chunks_BCK.shape
  if context == 'none':
    chunks_BCK, len_BC = chunks_BCK[:, :0], len_BC[:, :0]
  elif context == 'last_k':
    chunks_BCK = chunks_BCK.reshape(B, 1, C * K)[:, :, C * K - C :]
    len_BC = jnp.full((B, 1), C, jnp.int32)
  elif context != 'full':
    raise ValueError(f'no context {context!r}')
  batch = batch | {'chunks_BCK': chunks_BCK, 'chunk_len_BC': len_BC}
  all_BC = jnp.ones(len_BC.shape, bool)
  return output_nll(model, params, batch, None, all_BC, len_BC.shape[1])


def cepe_nll(model: Refrag, params, batch) -> jax.Array:
  """The baseline CEPE, (B, O): the context by cross-attention to its pieces.

  Args:
    model: for its config; CEPE reads three groups of the same parameters.
    batch: with piece_BPM and piece_len_BP (0 = absent); P may be 0.
  """
  cepe, variables = Cepe(model.cfg), {'params': params}
  memory = cepe.apply(
    variables, batch['piece_BPM'], batch['piece_len_BP'], method='encode'
  )
  hidden_BOD = cepe.apply(variables, batch, memory, method='decode')
  head_DV = cepe.apply(variables, method='head')
  return losses.token_nll(
    hidden_BOD, head_DV, batch['output_BO'], model.cfg.loss_block
  )
