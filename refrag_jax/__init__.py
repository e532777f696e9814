"""REFRAG (arXiv 2509.01092) in JAX/Flax."""

from typing import Any

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  """`refrag_jax.Refrag`, without JAX for those who do not ask for it."""
  if name == 'Refrag':
    from refrag_jax.serve.answers import Refrag

    return Refrag
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
