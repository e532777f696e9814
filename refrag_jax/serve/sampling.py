"""The next token of every row: greedy, or drawn from what is likely enough.

Dimension key: B rows, V vocabulary.

Nothing is sorted: a row keeps the tokens above a threshold, and the thresholds
of top-k and top-p are found by bisection on the bits of a float32, which 32
counts over the vocabulary make exact. Every row has its own settings and its
own seed; what is drawn at a position depends on (seed, position) and on that
row's logits, not on what else is in the batch.

The settings apply in the order of Hugging Face's `generate`: repetition
penalty, temperature, top-k, top-p, min-p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG = float(jnp.finfo(jnp.float32).min)


class Settings(NamedTuple):
  """How each row's tokens are drawn; all arrays are (B,)."""

  temperature: jax.Array  # 0: greedy, the rest is ignored but for the penalty
  top_k: jax.Array  # int32; 0: all tokens
  top_p: jax.Array  # 1: all of the probability
  min_p: jax.Array  # of the likeliest token's probability; 0: any
  repetition_penalty: jax.Array  # 1: none
  seed: jax.Array  # uint32


def sample(
  logits_BV: jax.Array,
  seen_BV: jax.Array,
  settings: Settings,
  position_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Draws a token for every row.

  Args:
    logits_BV: float32.
    seen_BV: bool, tokens of the prompt and of what was written, for the
      repetition penalty.
    settings: of each row.
    position_B: int32, of the token that is drawn.

  Returns:
    int32 tokens (B,), and log_softmax of the logits as they came at each.
  """
  scaled_BV = penalize(logits_BV, seen_BV, settings.repetition_penalty)
  hot_B = settings.temperature > 0
  greedy_B = first_largest(scaled_BV)

  def drawn():
    temperature_B = jnp.where(hot_B, settings.temperature, 1.0)
    kept_BV = keep(scaled_BV / temperature_B[:, None], settings)
    noise_BV = gumbel(settings.seed, position_B, logits_BV.shape[1])
    return jnp.where(hot_B, first_largest(kept_BV + noise_BV), greedy_B)

  # Noise and thresholds are some 70 passes over the vocabulary, which a step of
  # greedy rows need not wait for.
  token_B = jax.lax.cond(hot_B.any(), drawn, lambda: greedy_B)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0]
  return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def first_largest(x_BV: jax.Array) -> jax.Array:
  """Where each row is largest, int32 (B,), the first of equal values.

  By a maximum and a minimum, which a CPU computes many at once; XLA's argmax
  there goes one by one.
  """
  V = x_BV.shape[1]
  best_BV = x_BV == x_BV.max(-1, keepdims=True)
  first_B = jnp.where(best_BV, jnp.arange(V, dtype=jnp.int32), V).min(-1)
  return jnp.minimum(first_B, V - 1)  # of NaN nothing is the largest


def gumbel(seed_B: jax.Array, position_B: jax.Array, V: int) -> jax.Array:
  """What is drawn at a position, float32 (B, V), of each row's own seed."""

  def of_row(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, (V,), jnp.float32)

  return jax.vmap(of_row)(seed_B, position_B)


def penalize(
  logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
  """Makes what was seen less likely: logits above 0 divided, others times it.

  (Keskar et al. 2019, as Hugging Face has it.)
  """
  penalty_B1 = penalty_B[:, None]
  less_BV = jnp.where(
    logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1
  )
  return jnp.where(seen_BV, less_BV, logits_BV)


def keep(logits_BV: jax.Array, settings: Settings) -> jax.Array:
  """The logits, NEG for what top-k, top-p and min-p leave out.

  Tokens that tie with the last one that is kept are kept too.
  """
  V = logits_BV.shape[1]
  k_B = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V)
  least_B1 = threshold(logits_BV, jnp.ones_like(logits_BV), k_B)[:, None]
  logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, NEG)
  p_BV = jax.nn.softmax(logits_BV, axis=-1)
  # Of what rounding leaves of 1 not a little more may be asked than there is.
  mass_B = jnp.where(settings.top_p < 1, settings.top_p, 0.0)
  least_B1 = threshold(p_BV, p_BV, mass_B)[:, None]
  least_B1 = jnp.where(settings.top_p[:, None] < 1, least_B1, 0.0)
  best_B1 = p_BV.max(-1, keepdims=True)
  least_B1 = jnp.maximum(
    # The likeliest is kept whatever is asked.
    jnp.minimum(least_B1, best_B1),
    settings.min_p[:, None] * best_B1,
  )
  return jnp.where(p_BV >= least_B1, logits_BV, NEG)


def threshold(
  values_BV: jax.Array, weights_BV: jax.Array, enough_B: jax.Array
) -> jax.Array:
  """The largest t with `enough` weight of values >= t, in each row, (B,).

  Exact: t is one of the values wherever there is enough weight at all, and the
  least float32 otherwise.
  """
  ordered_BV = _ordered(values_BV)

  def body(i, low_B):
    # From the highest bit down: does the weight still do with it set?
    high_B = low_B | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
    weight_B = jnp.where(ordered_BV >= high_B[:, None], weights_BV, 0.0).sum(-1)
    return jnp.where(weight_B >= enough_B, high_B, low_B)

  low_B = jnp.zeros(values_BV.shape[:1], jnp.uint32)
  return _value(jax.lax.fori_loop(0, 32, body, low_B))


def _ordered(x: jax.Array) -> jax.Array:
  """float32 to uint32 in the same order."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  sign = bits >> 31
  return jnp.where(sign == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value(ordered: jax.Array) -> jax.Array:
  """Back; what no float has becomes the least one."""
  bits = jnp.where(
    ordered >> 31 == 1, ordered & jnp.uint32((1 << 31) - 1), ~ordered
  )
  x = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(jnp.isfinite(x), x, NEG)
