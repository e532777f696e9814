"""REPLUG (Shi et al. 2024): the decoder's ensemble over pieces of the context.

Dimension key: B batch, C chunks, K chunk size, P pieces, X = B * P folded, O
outputs.

Every piece stands alone before the output, and as many tokens are in it as
REFRAG has decoder positions for the whole context (L = s / k, so k pieces):

    BOS | piece_1 | y      BOS | piece_2 | y      ...      BOS | piece_P | y

    p(y_t | y_<t) = sum_i w_i(y_<t) p(y_t | piece_i, y_<t)

REPLUG weighs pieces by their similarity to a query, and here is none: there is
only text that goes on. In its place stands what a mixture itself knows, the
posterior of each piece after the outputs so far, from equal weights at the
first:

    w_i(y_<t) = p(y_<t | piece_i) / sum_j p(y_<t | piece_j)

which makes the product over t the likelihood of the whole output under the
uniform mixture of the pieces. (In the paper's Tables 1 and 2 REPLUG equals no
context in every cell; this one reads its pieces.)
"""

import jax
import jax.numpy as jnp

from refrag_jax.models.refrag import Refrag


def nll(model: Refrag, params, batch) -> jax.Array:
  """NLL of every output token under the ensemble, (B, O).

  One decoder call for all pieces; contexts without ragged chunks only.
  """
  B, C, K = batch['chunks_BCK'].shape
  pieces_BPYC = batch['chunks_BCK'].reshape(B, K, 1, C)
  len_BPY = jnp.full((B, K, 1), C, jnp.int32)
  return mixture(_nll_of(model, params, batch, pieces_BPYC, len_BPY))[0]


def over_passages(model: Refrag, params, batch, passages: int) -> jax.Array:
  """As `nll`, each passage a piece, (B, O).

  Args:
    passages: P; each has a P-th of the chunks, and may be absent.
  """
  B, _, K = batch['chunks_BCK'].shape
  pieces_BPYK = batch['chunks_BCK'].reshape(B, passages, -1, K)
  len_BPY = batch['chunk_len_BC'].reshape(B, passages, -1)
  nll_BPO = _nll_of(model, params, batch, pieces_BPYK, len_BPY)
  return mixture(nll_BPO, len_BPY.any(-1))[0]


def _nll_of(model, params, batch, pieces_BPYZ, len_BPY) -> jax.Array:
  """NLL of the outputs after each piece alone, (B, P, O).

  Args:
    pieces_BPYZ: decoder ids, Y stretches of up to Z in a piece, lengths beside.
  """
  B, P, Y, Z = pieces_BPYZ.shape
  pieces = {
    key: jnp.repeat(batch[key], P, axis=0)
    for key in ('prefix_BQ', 'prefix_len_B', 'output_BO', 'output_len_B')
  } | {
    'chunks_BCK': pieces_BPYZ.reshape(B * P, Y, Z),
    'chunk_len_BC': len_BPY.reshape(B * P, Y),
  }
  nll_XO = model.apply(
    {'params': params}, pieces, 'full', method=Refrag.plain_nll
  )
  return nll_XO.reshape(B, P, -1)


def mixture(
  nll_BPO: jax.Array, there_BP: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """The ensemble of pieces, from what each one makes of the output.

  Args:
    nll_BPO: -log p(y_t | piece_i, y_<t), float32.
    there_BP: which pieces there are; None: all. At least one in a row.

  Returns:
    -log p(y_t | y_<t), (B, O), and the logarithm of the weights w_i(y_<t),
    (B, P, O), which see no output from t on.
  """
  # Weights first, and not a difference of two long sums; and sums of what
  # tells the pieces apart, or rounding would grow with the length.
  apart_BPO = nll_BPO - nll_BPO.mean(1, keepdims=True)
  before_BPO = jnp.pad(
    jnp.cumsum(apart_BPO, axis=2)[:, :, :-1], ((0, 0), (0, 0), (1, 0))
  )
  if there_BP is not None:
    before_BPO = jnp.where(there_BP[:, :, None], before_BPO, jnp.inf)
  log_weight_BPO = jax.nn.log_softmax(-before_BPO, axis=1)
  return -jax.nn.logsumexp(log_weight_BPO - nll_BPO, axis=1), log_weight_BPO
