"""FLOPs: counted from a jaxpr, and in closed form of a config's sizes.

XLA's cost_analysis counts the body of a scanned layer once and knows nothing of
custom kernels; the jaxpr has every matrix product and every trip count, and
kernels by name.
"""

import math
from collections.abc import Mapping

from jax.extend import core


def count(jaxpr) -> int:
  """FLOPs of all dot_generals, 2abc each; scans times their length.

  Of all devices together: what a `shard_map` does counts for each of them. A
  kernel counts as many times as its grid has places, skipped ones included.
  A `while` counts its body once (its trip count is data), a `cond` its most
  expensive branch. Rematerialised products count as often as they run.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      lhs = eqn.invars[0].aval.shape
      inner = math.prod(lhs[i] for i in contract)
      total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    elif eqn.primitive.name.startswith('dot_product_attention'):  # cuDNN's
      (B, T, N, H), (_, S, *_) = (v.aval.shape for v in eqn.invars[:2])
      products = 5 if 'bwd' in eqn.primitive.name else 2
      total += products * 2 * B * N * T * S * H
    elif eqn.primitive.name == 'shard_map':  # its shapes are a device's part
      total += eqn.params['mesh'].size * count(eqn.params['jaxpr'])
    elif eqn.primitive.name == 'pallas_call':
      grid = eqn.params['grid_mapping'].grid
      total += math.prod(grid) * count(eqn.params['jaxpr'])
    elif eqn.primitive.name == 'scan':
      total += eqn.params['length'] * count(eqn.params['jaxpr'])
    elif eqn.primitive.name == 'cond':
      total += max(count(branch) for branch in eqn.params['branches'])
    else:
      total += sum(map(count, core.jaxprs_in_params(eqn.params)))
  return total


# --- In closed form, of a forward pass ----------------------------------------
# A product of (a, b) and (b, c) costs 2abc, and attention is dense, every query
# meeting every key, as XLA's masked attention computes it. Sizes are those of a
# config, as config.json has them: `decoder`, `encoder`, `policy` of
# config.model.


def decoder_flops(decoder: Mapping[str, int], positions: int) -> int:
  """Through all layers, without the output matrix."""
  query = decoder['num_heads'] * decoder['head_dim']
  key_value = decoder['num_kv_heads'] * decoder['head_dim']
  width = decoder['width']
  weights = 2 * width * (query + key_value) + 3 * width * decoder['mlp_width']
  return _stack(decoder['num_layers'], weights, query, positions)


def encoder_flops(
  encoder: Mapping[str, int], sequences: int, length: int
) -> int:
  """`sequences` of `length` encoder tokens, special tokens included."""
  width = encoder['width']
  weights = 4 * width**2 + 2 * width * encoder['mlp_width']
  return sequences * _stack(encoder['num_layers'], weights, width, length)


def projection_flops(
  encoder: Mapping[str, int], decoder: Mapping[str, int], chunks: int
) -> int:
  """The projection of every chunk vector (paper B.2: hidden = output width)."""
  return 2 * chunks * decoder['width'] * (encoder['width'] + decoder['width'])


def policy_flops(
  policy: Mapping[str, int], encoder: Mapping[str, int], chunks: int
) -> int:
  """One score for every chunk, at the encoder's width."""
  width = encoder['width']
  weights = 4 * width**2 + 2 * width * policy['mlp_width']
  stack = _stack(policy['num_layers'], weights, width, chunks)
  return stack + 2 * chunks * width


def cross_attention_flops(
  encoder: Mapping[str, int],
  decoder: Mapping[str, int],
  positions: int,
  states: int,
) -> int:
  """CEPE's reading of `states` encoder tokens from `positions`, all layers."""
  query = decoder['num_heads'] * decoder['head_dim']
  key_value = decoder['num_kv_heads'] * decoder['head_dim']
  weights = 2 * positions * decoder['width'] * query
  weights += 2 * states * encoder['width'] * key_value
  attention = 2 * positions * states * query
  return decoder['num_layers'] * 2 * (weights + attention)


def _stack(layers: int, weights: int, attention: int, length: int) -> int:
  """`weights` of a layer meet each position; two products in attention."""
  return layers * (2 * weights * length + 4 * attention * length**2)
