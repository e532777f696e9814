"""REFRAG (arXiv 2509.01092) in JAX/Flax."""

__version__ = '0.1.0'
