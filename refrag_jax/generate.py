"""Greedy generation after any layout: prefill, then one token at a time, until
all rows have ended.

Dimension key: B batch, C chunks, O forced output tokens, T prefill positions,
W new tokens, S = T + W - 1 cache slots (nothing reads the last token).
"""

import jax
import jax.numpy as jnp

from refrag_jax.data import batch as batch_lib
from refrag_jax.models import splice
from refrag_jax.models.refrag import Refrag


def continuation(
    model: Refrag, params, batch, expand_BC, num_expanded: int, prompt: int,
    eos_id: int,
) -> jax.Array:  # fmt: skip
  """What a batch's outputs are written as, int32 (B, O - prompt).

  Args:
    batch: what a row has outside of its loss is given, the rest is not looked
      at.
    prompt: the most outputs that are given in a row, static.
    expand_BC, num_expanded: as in `Refrag.output_nll`.
  """
  given = batch_lib.cut_outputs(batch, prompt)
  given['output_len_B'] = batch['loss_mask_BO'].argmax(1).astype(jnp.int32)
  C, O = expand_BC.shape[1], batch['output_BO'].shape[1]
  e_BCD = None
  if num_expanded < C:
    e_BCD = model.apply({'params': params}, batch, method=Refrag.project_chunks)
  return greedy(
      model, params, given, e_BCD, expand_BC, num_expanded, O - prompt, eos_id
  )  # fmt: skip


def greedy(
    model: Refrag, params, batch, e_BCD, expand_BC, num_expanded: int,
    num_tokens: int, eos_id: int,
) -> jax.Array:  # fmt: skip
  """The most likely continuation, int32 (B, W); `eos_id` from its end on.

  The first token comes from the prefill's logits. `batch['output_BO']` holds
  what the answer starts with (a prompt's "Answer:"), `output_len_B` >= 0 of it.

  Args:
    e_BCD: projected chunk embeddings, None with every chunk expanded.
    num_expanded: static bound on expanded chunks in a row.
    num_tokens: W, static.
  """
  # One slot more than training's layout: the last forced token is an input.
  forced = jnp.pad(batch['output_BO'], ((0, 0), (0, 1)))
  layout = splice.layout_of(
    batch | {'output_BO': forced}, expand_BC, num_expanded
  )
  hidden_BTD, cache = model.apply(
    {'params': params}, layout, e_BCD, {}, method=Refrag.run
  )
  room = ((0, 0), (0, 0), (0, 0), (0, num_tokens - 1), (0, 0))
  cache = jax.tree.map(lambda x_YBMTH: jnp.pad(x_YBMTH, room), cache)
  length_B = layout.valid_BT.sum(1).astype(jnp.int32)
  return _write(model, params, hidden_BTD, cache, length_B, num_tokens, eos_id)


def scored_and_written(
    model: Refrag, params, batch, expand_BC, num_expanded: int, prompt: int,
    eos_id: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """NLL of a batch's outputs, (B, O), and their `continuation`, from one pass.

  What is scored stands in the cache where the continuation will; each token is
  written over it before it is looked at.
  """
  variables = {'params': params}
  e_BCD = None
  if num_expanded < expand_BC.shape[1]:
    e_BCD = model.apply(variables, batch, method=Refrag.project_chunks)
  layout = splice.layout_of(batch, expand_BC, num_expanded)
  hidden_BTD, cache = model.apply(
    variables, layout, e_BCD, {}, method=Refrag.run
  )
  hidden_BOD = jnp.take_along_axis(hidden_BTD, layout.output_BO[..., None], 1)
  nll_BO = model.apply(
    variables, hidden_BOD, batch['output_BO'], method=Refrag.nll
  )
  given_B1 = batch['loss_mask_BO'].argmax(1)[:, None]
  length_B = jnp.take_along_axis(layout.output_BO, given_B1, 1)[:, 0] + 1
  tokens_BW = _write(
    model, params, hidden_BTD, cache, length_B,
    batch['output_BO'].shape[1] - prompt, eos_id,
  )  # fmt: skip
  return nll_BO, tokens_BW


def _write(
    model: Refrag, params, hidden_BTD, cache, length_B, num_tokens: int,
    eos_id: int,
) -> jax.Array:  # fmt: skip
  """The most likely tokens behind the first `length_B` positions, (B, W)."""
  variables = {'params': params}
  head_DV = model.apply(variables, method=Refrag.head)
  last_BD = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], 1)[
    :, 0
  ]

  def choose(hidden_BD):
    logits_BV = jnp.einsum(
      'BD,DV->BV',
      hidden_BD,
      head_DV.astype(hidden_BD.dtype),
      preferred_element_type=jnp.float32,
    )
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)

  first_B = choose(last_BD)
  B = len(first_B)
  tokens_BW = jnp.full((B, num_tokens), eos_id, jnp.int32).at[:, 0].set(first_B)
  if num_tokens == 1:
    return tokens_BW

  def body(carry):
    w, tokens_BW, cache = carry
    before_B = tokens_BW[:, w - 1]
    hidden_BD, cache = model.apply(
      variables, before_B, length_B + w - 1, cache, method=Refrag.step
    )
    token_B = jnp.where(before_B == eos_id, eos_id, choose(hidden_BD))
    return w + 1, tokens_BW.at[:, w].set(token_B), cache

  def goes_on(carry):
    w, tokens_BW, _ = carry
    return (w < num_tokens) & (tokens_BW[:, w - 1] != eos_id).any()

  return jax.lax.while_loop(goes_on, body, (1, tokens_BW, cache))[1]
