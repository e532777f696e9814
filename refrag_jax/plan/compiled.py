"""A program that is compiled for devices that are not there, and its bytes."""

import math
from typing import Any

import jax

from refrag_jax.errors import UserError
from refrag_jax.plan import topologies

# Of a GPU's memory a program may have: the rest goes to the driver, NCCL's
# buffers and fragmentation. A TPU's compiler says itself what does not fit.
USABLE = 0.92


def compile_with(
  traced, there: topologies.Topology, options: dict[str, Any]
) -> tuple[dict[str, int], str]:
  """Bytes of a device, and the program's text.

  Raises:
    UserError: the compiler does not know an option.
  """
  lowered = traced.lower()
  try:
    with topologies.compiler_output():
      compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if 'No such compile option' in str(e):
      raise UserError(
        f'config.cluster, xla_flags or libtpu_flags: {e}'
      ) from None
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return topologies.exhausted(str(e), there.chip), ''
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes
  temp = memory.temp_size_in_bytes
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    'argument_bytes': kept,
    'temp_bytes': temp,
    'peak_bytes': kept + temp + fresh,
  }, compiled.as_text()


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def usable(there: topologies.Topology) -> float:
  """Bytes of a device that a program may take; of this machine, anything."""
  if there.chip.platform == 'cpu':
    return math.inf
  return there.chip.hbm * (USABLE if there.chip.platform == 'cuda' else 1.0)
