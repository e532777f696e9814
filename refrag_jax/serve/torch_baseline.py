"""The same decoder in transformers' torch, as a baseline; the home of torch.

What a user would run otherwise: its own attention (sdpa), its own cache, as
many threads as this process has cores.
"""

import os
import tempfile
import time
from typing import Any

import jax
import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, families
from refrag_jax.models import lora


def load(config: Config, params: dict) -> Any:
  """The decoder as transformers' own model, in float32, ready to run.

  Raises:
    UserError: torch or transformers is not installed.
  """
  try:
    import torch
    import transformers
  except ImportError as e:
    raise UserError(
      f'config.bench.transformers is on, and {e.name} is not installed: pip '
      'install torch transformers, or leave it off'
    ) from None
  torch.set_num_threads(os.cpu_count() or 1)
  if 'lora' in params:
    params = lora.merge(params, config.model.lora)
  decoder = jax.device_get(params['decoder'])
  with tempfile.TemporaryDirectory() as directory:
    convert.write_params(
      directory, 'decoder', decoder,
      families.decoder_json(config.model.decoder), np.float32,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32
    ).eval()


def generate(model: Any, ids_BT: np.ndarray, number: int) -> list[float]:
  """Seconds from the ids in hand to each of so many greedy tokens."""
  import torch

  ids, cache, seconds = torch.tensor(ids_BT), None, []
  start = time.perf_counter()
  with torch.inference_mode():
    for _ in range(number):
      out = model(
        ids, past_key_values=cache, use_cache=True, logits_to_keep=1
      )  # fmt: skip
      cache = out.past_key_values
      ids = out.logits[:, -1].argmax(-1, keepdim=True)
      ids.tolist()
      seconds.append(time.perf_counter() - start)
  return seconds
