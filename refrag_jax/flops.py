"""FLOPs of a jitted function, counted from its jaxpr.

XLA's cost_analysis counts the body of a scanned layer once and knows nothing of
custom kernels; the jaxpr has every matrix product and every trip count, and
kernels by name.
"""

import math

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
