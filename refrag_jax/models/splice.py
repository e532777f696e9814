"""The one layout builder: question, chunks and output in one static sequence.

Training, evaluation and generation all build the decoder's input here.

Dimension key: B batch, Q prefix slots, C chunks (the paper's L), K chunk size
(k), O output slots, I = Q + C + O items, T decoder positions, D width.

    items       prefix tokens | chunk 0 | chunk 1 | ... | output tokens
    positions   1 each        | 1, or its tokens where expanded | 1 each

A row's layout is the concatenation of its items, each as long as it is: an
absent item has length 0, a compressed chunk 1, an expanded chunk as many as it
has tokens (in place: paper A.1, E(x, l)). Lengths are data, T is static, so one
compiled program serves every choice of chunks and every ragged row.

With prefix "BOS q", k = 3, chunks "abc" "def" "gh" (the last one short), the
middle one expanded, and output "xyz":

    position   0   1   2     3  4  5   6     7  8
    holds      BOS q   e_0   d  e  f   e_2   x  y        z is only a target
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refrag_jax.sharding import axis_size


class Layout(NamedTuple):
  """Where each decoder position gets its input, and where outputs are read."""

  token_BT: jax.Array  # int32 token ids; 0 where a chunk vector or padding is
  chunk_BT: jax.Array  # int32 chunk index, -1 where a token or padding is
  valid_BT: jax.Array  # bool, False on the padding at the end
  output_BO: jax.Array  # int32 position whose hidden state predicts output j


def num_positions(
  prefix: int, chunks: int, chunk_size: int, outputs: int, expanded: int
) -> int:
  """T for `expanded` expanded chunks; the last output is not an input.

  Filled up so that the devices that share a row get equal parts of it.
  """
  T = prefix + (chunks - expanded) + expanded * chunk_size + outputs - 1
  return T + -T % axis_size('sequence')


def build_layout(
    prefix_BQ, prefix_len_B, chunks_BCK, chunk_len_BC, expand_BC,
    output_BO, output_len_B, num_positions: int,
) -> Layout:  # fmt: skip
  """Lays out each row; pure integer arithmetic, no branch on data.

  Args:
    prefix_BQ: token ids before the context (BOS, question), lengths beside.
    chunks_BCK: the decoder tokens of each chunk, lengths beside (0 = absent).
    expand_BC: True where the chunk's own tokens stand instead of its vector.
    output_BO: token ids of the output, lengths beside.
    num_positions: T; what does not fit is cut off, so use `num_positions()`.
  """
  B, Q = prefix_BQ.shape
  _, C, K = chunks_BCK.shape
  O = output_BO.shape[1]
  chunk_items_BC = jnp.where(
    expand_BC, chunk_len_BC, jnp.minimum(chunk_len_BC, 1)
  )
  length_BI = jnp.concatenate(
    [
      (jnp.arange(Q)[None] < prefix_len_B[:, None]).astype(jnp.int32),
      chunk_items_BC.astype(jnp.int32),
      (jnp.arange(O)[None] < output_len_B[:, None]).astype(jnp.int32),
    ],
    axis=1,
  )
  end_BI = jnp.cumsum(length_BI, 1)
  t_T = jnp.arange(num_positions, dtype=jnp.int32)
  item_BT = jax.vmap(lambda end_I: jnp.searchsorted(end_I, t_T, side='right'))(
    end_BI
  ).astype(jnp.int32)
  valid_BT = item_BT < Q + C + O
  item_BT = jnp.minimum(item_BT, Q + C + O - 1)
  start_BI = end_BI - length_BI
  offset_BT = t_T[None] - jnp.take_along_axis(start_BI, item_BT, 1)

  # One flat table of ids per row: prefix | output | every chunk's tokens.
  table_BS = jnp.concatenate(
    [prefix_BQ, output_BO, chunks_BCK.reshape(B, C * K)], axis=1
  )
  in_chunk_BT = (item_BT >= Q) & (item_BT < Q + C) & valid_BT
  index_BT = jnp.where(in_chunk_BT, item_BT - Q, 0)
  if C:
    expanded_BT = in_chunk_BT & jnp.take_along_axis(expand_BC, index_BT, 1)
  else:
    expanded_BT = jnp.zeros_like(in_chunk_BT)
  vector_BT = in_chunk_BT & ~expanded_BT
  source_BT = jnp.where(item_BT < Q, item_BT, item_BT - C)
  source_BT = jnp.where(
    expanded_BT, Q + O + index_BT * K + offset_BT, source_BT
  )
  token_BT = jnp.take_along_axis(
    table_BS, jnp.where(vector_BT | ~valid_BT, 0, source_BT), 1
  )
  # Output j is predicted from the position before its own.
  first_B1 = end_BI[:, Q + C - 1][:, None]
  output_pos_BO = first_B1 + jnp.arange(O, dtype=jnp.int32)[None] - 1
  return Layout(
    token_BT=jnp.where(vector_BT | ~valid_BT, 0, token_BT),
    chunk_BT=jnp.where(vector_BT, index_BT, -1),
    valid_BT=valid_BT,
    output_BO=jnp.clip(output_pos_BO, 0, num_positions - 1),
  )


def layout_of(batch, expand_BC, num_expanded: int) -> Layout:
  """The layout of a batch (data/batch.py has the fields).

  Args:
    expand_BC: bool; at most `num_expanded` (static) True in a row.
  """
  chunks_BCK = batch['chunks_BCK']
  T = num_positions(
    batch['prefix_BQ'].shape[1],
    chunks_BCK.shape[1],
    chunks_BCK.shape[2],
    batch['output_BO'].shape[1],
    num_expanded,
  )
  return build_layout(
      batch['prefix_BQ'], batch['prefix_len_B'], chunks_BCK,
      batch['chunk_len_BC'], expand_BC, batch['output_BO'],
      batch['output_len_B'], T,
  )  # fmt: skip


def fill(layout: Layout, token_embeds_BTD, chunk_embeds_BCD) -> jax.Array:
  """The decoder's input (B, T, D): tokens with chunk vectors between them."""
  if chunk_embeds_BCD is None:
    return token_embeds_BTD
  index_BT1 = jnp.maximum(layout.chunk_BT, 0)[..., None]
  vector_BTD = jnp.take_along_axis(chunk_embeds_BCD, index_BT1, 1)
  is_vector_BT1 = (layout.chunk_BT >= 0)[..., None]
  return jnp.where(
    is_vector_BT1, vector_BTD.astype(token_embeds_BTD.dtype), token_embeds_BTD
  )
