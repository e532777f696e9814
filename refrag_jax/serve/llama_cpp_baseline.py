"""llama.cpp beside the engine, on a .gguf file; the home of llama_cpp.

It keeps the file's own weights, of 4 bits say, and multiplies them as they are,
where the engine has made floats of them: the same decoder, less to read.
"""

import os
import time
from typing import Any

import numpy as np

from refrag_jax.errors import UserError
from refrag_jax.serve.baselines import Generate


def load(path: str, positions: int, vocab_size: int) -> Generate:
  """Reads the file, with room for so many positions.

  Args:
    vocab_size: the decoder's; a file of another is another model's.

  Raises:
    UserError: llama-cpp-python is not installed, or cannot read the file, or it
      has another vocabulary.
  """
  try:
    import llama_cpp
  except ImportError as e:
    raise UserError(
      f'config.bench.llama_cpp is {path}, and {e.name} is not installed: pip '
      'install llama-cpp-python, which compiles it, or leave it out'
    ) from None
  threads = os.cpu_count()
  try:
    model = llama_cpp.Llama(
      path, n_ctx=positions, n_threads=threads, n_threads_batch=threads,
      verbose=False,
    )  # fmt: skip
  except (ValueError, OSError) as e:
    raise UserError(f'config.bench.llama_cpp: {path}: {e}') from None
  if model.n_vocab() != vocab_size:
    raise UserError(
      f'config.bench.llama_cpp: {path} has a vocabulary of {model.n_vocab()}, '
      f'and the decoder of {vocab_size}: give the same decoder'
    )
  return lambda ids_BT, number: generate(model, ids_BT, number)


def generate(model: Any, ids_BT: np.ndarray, number: int) -> list[float]:
  """Seconds to each of so many greedy tokens; of one row."""
  (tokens,), seconds = ids_BT.tolist(), []
  start = time.perf_counter()
  model.reset()
  for _ in range(number):
    model.eval(tokens)
    tokens = [model.sample(temp=0.0)]
    seconds.append(time.perf_counter() - start)
  return seconds
