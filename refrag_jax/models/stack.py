"""Layers of one kind, one after the other: how they run, and what they keep.

Their parameters are one array for all of them, with the layer as its first
axis, however they run.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import checkpoint_policies

# What the attentions of models/attention.py call the results that their
# backward needs; cuDNN's, in JAX itself, has no name but that of its primitive.
ATTENTION = 'attention'
CUDNN = 'dot_product_attention_fwd_wrapper'

_kept = checkpoint_policies.save_from_both_policies(
  checkpoint_policies.dots_with_no_batch_dims_saveable,
  checkpoint_policies.save_only_these_names(ATTENTION),
)


def _products(primitive, *args, **params) -> bool:
  """Keeps products with weights and the results of attention in blocks.

  The latter are a small part of a layer's bytes and a large one of the time
  that doing things twice would take.
  """
  return primitive.name == CUDNN or _kept(primitive, *args, **params)


REMAT = {
  'none': checkpoint_policies.everything_saveable,
  'dots': _products,
  'full': checkpoint_policies.nothing_saveable,
}


def stack(
  block: type[nn.Module],
  length: int,
  remat: str,
  scan_layers: bool,
  in_axes: Any,
) -> Callable[..., nn.Module]:
  """Returns what makes a module of `length` blocks out of a block's fields.

  Args:
    block: called with a carry and more; returns the carry and what is stacked.
    length: number of layers.
    remat: of REMAT; what a layer keeps for its backward.
    scan_layers: one layer is compiled, in a loop; else all of them, one by one,
      which takes longer, and whose arrays nobody copies into stacks and out.
    in_axes: of the arguments after the carry: 0 or nn.broadcast.
  """
  if remat != 'none':
    # Across the iterations of a loop XLA cannot merge common subexpressions, so
    # only layers one by one need the barrier that prevents it.
    block = nn.remat(block, policy=REMAT[remat], prevent_cse=not scan_layers)
  return nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=in_axes,
    length=length,
    unroll=1 if scan_layers else length,
  )
