"""The same decoder in transformers' torch, as a baseline; the home of torch.

What a user would run otherwise: its own attention (sdpa), its own cache, as
many threads as this process has cores.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, families
from refrag_jax.models import lora
from refrag_jax.runtime.progress import say


def rows(
  config: Config, model: Any, cells: Iterable[Any]
) -> list[dict[str, Any]]:
  """Rows of bench.json, one a cell: times of prefill and of each step.

  Args:
    model: as from `load`.
  """
  out = []
  for cell in cells:
    positions = cell.context + config.bench.question_tokens
    shape = (cell.batch, positions)
    first, steps, whole = [], [], []
    for turn in range(1 + config.bench.repeats):
      rng = np.random.default_rng((turn, *shape))
      ids = rng.integers(0, config.model.decoder.vocab_size, shape)
      times = generate(model, ids, config.bench.output_tokens)
      if turn:
        first.append(times[0])
        steps += np.diff(times).tolist()
        whole.append(times[-1])
    ms = lambda values, q: float(np.percentile(values, q) * 1e3)
    row = {
      'model': config.name, **cell._asdict(),
      'question': config.bench.question_tokens, 'context_tokens': cell.context,
      'decoder_positions': positions, 'padded_positions': positions,
      'requests': cell.batch * config.bench.repeats, 'split_ms': {},
      'compiles': 0,
      'output_throughput': (
        cell.batch * config.bench.output_tokens / statistics.mean(whole)
      ),
      'request_throughput': cell.batch / statistics.mean(whole),
    }  # fmt: skip
    for name, values in (
      ('ttft', first), ('tpot', steps), ('itl', steps), ('e2el', whole)
    ):  # fmt: skip
      if not values:
        continue
      row[f'mean_{name}_ms'] = statistics.mean(values) * 1e3
      row |= {f'p{q}_{name}_ms': ms(values, q) for q in (50, 95, 99)}
    say(f'bench: transformers {cell.context} tokens: first token after '
        f'{row["mean_ttft_ms"]:.1f} ms')  # fmt: skip
    out.append(row)
  return out


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
