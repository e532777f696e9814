"""What a user would run otherwise, as rows of bench.json.

Each baseline is a function from ids (B, T) and a number to the seconds from
the ids in hand to each of so many greedy tokens, in a file of its own: torch's
in torch_baseline.py, llama.cpp's in llama_cpp_baseline.py.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.runtime.progress import say

PERCENTILES = (50, 95, 99)
Generate = Callable[[np.ndarray, int], list[float]]


def rows(
  config: Config, generate: Generate, cells: Iterable[Any]
) -> list[dict[str, Any]]:
  """Rows of bench.json, one a cell of full context: times of all tokens."""
  out = []
  for cell in cells:
    positions = cell.context + config.bench.question_tokens
    shape = (cell.batch, positions)
    first, steps, whole = [], [], []
    for turn in range(1 + config.bench.repeats):
      rng = np.random.default_rng((turn, *shape))
      ids = rng.integers(0, config.model.decoder.vocab_size, shape)
      times = generate(ids, config.bench.output_tokens)
      if turn:
        first.append(times[0])
        steps += np.diff(times).tolist()
        whole.append(times[-1])
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
      **statistics_ms(ttft=first, tpot=steps, itl=steps, e2el=whole),
    }  # fmt: skip
    say(f'bench: {cell.arm} {cell.context} tokens: first token after '
        f'{row["mean_ttft_ms"]:.1f} ms')  # fmt: skip
    out.append(row)
  return out


def statistics_ms(**seconds: Iterable[float]) -> dict[str, float]:
  """Means, standard errors and percentiles, named as `vllm bench serve` does.

  Args:
    seconds: `ttft`, `tpot`, ..., of every request or step.
  """
  out = {}
  for name, values in seconds.items():
    ms = np.asarray(values) * 1e3
    if not len(ms):
      continue
    out[f'mean_{name}_ms'] = float(ms.mean())
    if len(ms) > 1:
      out[f'se_{name}_ms'] = float(ms.std(ddof=1) / len(ms) ** 0.5)
    for q in PERCENTILES:
      out[f'p{q}_{name}_ms'] = float(np.percentile(ms, q))
  return out
