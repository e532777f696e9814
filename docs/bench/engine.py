r"""The engine beside transformers' torch, same weights, same threads, one run.

  launch/models.sh
  .venv/bin/python -m pip install torch==2.13.0
  PYTHONPATH=. .venv/bin/python docs/bench/engine.py \
    [--repeats=5] [--json=OUT.json]

On SmolLM2-135M in float32: a prefill of 256, 1,024 and 4,096 tokens; a decode
step with 1,024 tokens in the cache, for 1 and for 8 sequences; the first token
of a context whose chunk embeddings are in hand, beside a plain prefill of as
many positions; and with encoding, beside the sum of its parts. Medians; the two
take turns, so that a busy machine hurts both.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np

from refrag_jax import session as session_lib
from refrag_jax.config import load
from refrag_jax.serve import programs, torch_baseline
from refrag_jax.serve.engine import Engine, Options, Prompt, settings_of

DECODER = 'models/SmolLM2-135M-Instruct.Q4_1.gguf'
ENCODER = 'models/all-MiniLM-L6-v2'
PREFILLS, CACHE, BATCHES = (256, 1024, 4096), 1024, (1, 8)
CONTEXTS, K = (4096, 16_384), 16
SLOT = 4608  # positions


def main() -> None:
  """Prints a line a measure, and writes all of them."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--json', default='')
  args = parser.parse_args()
  config, params = ours()
  ids = np.random.default_rng(0).integers(100, 40_000, (8, 4096))
  rows = []

  def report(what: str, limit: float, ours_s, theirs_s, other: str) -> None:
    of = [statistics.median(x) * 1e3 for x in (ours_s, theirs_s)]
    rows.append(
      {'what': what, 'ours_ms': of[0], 'other_ms': of[1], 'other': other,
       'ratio': of[0] / of[1], 'limit': limit, 'repeats': args.repeats}
    )  # fmt: skip
    print(
      f'{what:44}{of[0]:9.1f} ms  {other} {of[1]:9.1f} ms  ratio '
      f'{of[0] / of[1]:.2f} (asked for: {limit})', flush=True,
    )  # fmt: skip

  model = torch_baseline.load(config, params)
  engine = make(config, params, 1, SLOT)
  for length in PREFILLS:
    a, b = in_turns(
      args.repeats, prefill(engine, ids[0, :length]),
      lambda length=length: torch_baseline.generate(model, ids[:1, :length], 1),
    )  # fmt: skip
    report(f'prefill of {length} tokens', 0.8, a, b, 'torch')
  for batch, limit in zip(BATCHES, (0.8, 0.6), strict=True):
    pool = make(config, params, batch, 1536)
    a, b = in_turns(
      4 * args.repeats, decode(pool, ids[:batch, : CACHE - 1]),
      torch_decode(model, ids[:batch, : CACHE - 1]),
    )  # fmt: skip
    report(f'decode step, {batch} sequences at {CACHE}', limit, a, b, 'torch')
    del pool
  for context in CONTEXTS:
    compressed, as_long, whole, parts = first_token(config, params, context)
    a, b = in_turns(args.repeats, compressed, as_long)
    report(f'first token, {context} tokens cached, k = {K}', 1.1, a, b, 'plain')
    a, b = in_turns(args.repeats, whole, parts)
    report(f'the same, encoded first, k = {K}', 1.15, a, b, 'parts')
  if args.json:
    versions = {'jax': jax.__version__, 'python': platform.python_version()}
    with open(args.json, 'w') as f:
      json.dump({'cpus': os.cpu_count(), **versions, 'rows': rows}, f, indent=1)


def ours():
  """The config of the pair at k = 16, and its parameters."""
  from refrag_jax import cli

  found = cli.load(cli.parse(['--config=configs/smollm2.py:k16']))
  config = load.changed(
    found.config,
    ['model.compute_dtype=float32', 'model.lora.rank=0'],
  )  # fmt: skip
  opened = session_lib.open_model(config)
  with jax.set_mesh(opened.mesh):
    params, _ = session_lib.load_params(opened, f'{DECODER},{ENCODER}', 'bench')
  return config, params


def make(config, params, rows: int, length: int) -> Engine:
  """An engine with one pool."""
  return Engine(
    config.model, params, 1 << 30, [(rows, length)], 1024,
    config.data.max_encoder_tokens, attend='blockwise',
  )  # fmt: skip


def in_turns(repeats: int, *functions) -> list[list[float]]:
  """Seconds of each call of each function, after two that do not count."""
  seconds = [[] for _ in functions]
  for round_ in range(2 + repeats):
    for function, of in zip(functions, seconds, strict=True):
      start = time.perf_counter()
      function()
      if round_ > 1:
        of.append(time.perf_counter() - start)
  return seconds


def plain(engine: Engine, ids: np.ndarray) -> Prompt:
  """A request of tokens alone."""
  return Prompt(
    ids.astype(np.int32), np.zeros((0, K), np.int32), np.zeros(0, np.int32),
    np.zeros((0, engine.cfg.encoder.width), np.float32), np.zeros(0, bool),
    np.zeros(0, np.int32),
  )  # fmt: skip


def prefill(engine: Engine, ids: np.ndarray):
  """Reads tokens and draws one."""
  prompt = plain(engine, ids)
  return lambda: answer(engine, prompt)


def answer(engine: Engine, prompt: Prompt) -> None:
  """A request of one token, from its submission to the token."""
  engine.submit(prompt, Options(max_tokens=1))
  for _ in engine.run():
    pass


def decode(engine: Engine, ids_BT: np.ndarray):
  """One step of a pool whose rows hold so many tokens."""
  for row in ids_BT:  # slots that stay taken
    engine.submit(plain(engine, row), Options(max_tokens=256))
  engine.step()
  (pool,) = engine.pools
  active_B = np.ones(len(pool.running), bool)
  position = np.full(len(active_B), ids_BT.shape[1], np.int32)

  def step():
    # The same position each time: the cache stays as long as it is.
    slots = pool.slots._replace(position_B=jax.numpy.array(position))
    pool.slots, token_B, _ = programs.decode(
      engine.weights, slots, active_B, settings_of([Options()] * len(active_B)),
      cfg=engine.cfg.decoder, attend='blockwise', live=CACHE,
    )  # fmt: skip
    jax.block_until_ready(token_B)

  return step


def torch_decode(model, ids_BT: np.ndarray):
  import torch

  with torch.inference_mode():
    cache = model(
      torch.tensor(ids_BT), use_cache=True, logits_to_keep=1
    ).past_key_values
  token = torch.full((len(ids_BT), 1), 5)

  def step():
    with torch.inference_mode():
      out = model(token, past_key_values=cache, use_cache=True)
      tokens = out.logits[:, -1].argmax(-1).tolist()
      cache.crop(-1)  # as long as it was
      return tokens

  return step


def first_token(config, params, context: int):
  """Functions: cached, a plain prefill as long, encoded first, and in parts."""
  C, M = context // K, config.data.max_encoder_tokens
  rng = np.random.default_rng(1)
  question = rng.integers(100, 40_000, 16).astype(np.int32)
  engine = make(config, params, 1, -(-(C + 64) // 512) * 512)
  encoder_CM = rng.integers(1000, 20_000, (C, M)).astype(np.int32)
  len_C = np.full(C, M - 4, np.int32)
  c_CE = jax.block_until_ready(engine.encode(encoder_CM, len_C))

  def prompt(c_CE):
    return Prompt(
      question, rng.integers(100, 40_000, (C, K)).astype(np.int32),
      np.full(C, K, np.int32), c_CE, np.zeros(C, bool), question,
    )  # fmt: skip

  held = prompt(c_CE)
  as_long = prefill(engine, rng.integers(100, 40_000, held.positions()))

  def whole():
    fresh = engine.encode(encoder_CM, len_C)
    answer(engine, dataclasses.replace(held, c_CE=fresh))

  def parts():
    jax.block_until_ready(engine.encode(encoder_CM, len_C))
    answer(engine, held)

  return (lambda: answer(engine, held)), as_long, whole, parts


if __name__ == '__main__':
  main()
