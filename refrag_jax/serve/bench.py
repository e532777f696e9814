"""`--mode=bench`: how soon the first token comes, and the others after it.

Dimension key: C chunks of a context, K chunk size, M encoder tokens, T tokens.

A cell is one way of reading contexts of one length, with so many requests at
once. Every cell gets prompts of its own, from the config's text, and writes a
fixed number of tokens; programs are compiled before, and a cell that compiles
all the same says so. Times run from the passages, cut into chunks, in hand to
the token on the host; what cutting takes is beside. Beside each speed-up stands
what FLOPs allow, and beside each time what the device's FLOPs and bytes do: a
ratio above its limit is owed to a slow baseline. Where as many requests are
asked for as fit, what counts is how many they are and what all of them bring.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refrag_jax import flops
from refrag_jax import session as session_lib
from refrag_jax.config import check
from refrag_jax.config.schema import Config, ModelConfig, expanded_chunks
from refrag_jax.data import chunking, tokenizers
from refrag_jax.errors import UserError
from refrag_jax.models import lora
from refrag_jax.runtime import chips, environment, files, progress
from refrag_jax.runtime.progress import say
from refrag_jax.serve import baselines, programs
from refrag_jax.serve.engine import Engine, Options, Prompt, bucket

AS_MANY_AS_FIT = 0  # in config.bench.batches
MOST = 512  # at once, however many fit
KEPT = 0.1  # of a device's memory is for what a program needs beside its slots


class Cell(NamedTuple):
  """One way of reading contexts of one length."""

  arm: str  # full_context, last_k, refrag
  context: int  # tokens
  k: int
  p: float
  cached: bool  # chunk embeddings in hand
  batch: int
  saturated: bool = False  # as many as fit

  @property
  def chunks(self) -> int:
    return self.context // self.k

  @property
  def expanded(self) -> int:
    return expanded_chunks(self.p, self.chunks)

  @property
  def read(self) -> int:
    """Positions of the decoder that the context takes."""
    if self.arm == 'full_context':
      return self.context
    return self.chunks + self.expanded * (self.k - 1)


ARMS = {
  'full_context': 'full context',
  'last_k': 'last tokens',
  'refrag': 'REFRAG',
  'transformers': 'transformers',
  'llama_cpp': 'llama.cpp',
}


# What a baseline computes with.
BELOW = {'transformers': 'torch', 'llama_cpp': 'llama-cpp-python'}


def label(row: Mapping[str, Any]) -> str:
  """What a row reads, for people."""
  name = ARMS[row['arm']]
  if row['arm'] == 'last_k':
    return f'{name}, one for {row["k"]}'
  if row['arm'] != 'refrag':
    return name
  held = 'in hand' if row['cached'] else 'encoded'
  return f'{name}, k = {row["k"]}, p = {row["p"]:g}, {held}'


class Times(NamedTuple):
  """Of one request, in seconds."""

  tokens: list[float]  # when each came, after its submission
  steps: dict[str, float]  # of what was done before the prefill


def run(config: Config, workdir: str, source: str) -> int:
  """Measures every cell, writes bench.json and bench.html.

  Args:
    source: a checkpoint or an export; '': parameters as they are drawn, whose
      times are the same.

  Raises:
    UserError: a cell has more positions than the decoder.
  """
  check_bench(config)
  opened = session_lib.settle_attention(session_lib.open_model(config))
  with jax.set_mesh(opened.mesh):
    params, from_source = _params(opened, source)
    if 'lora' in params:
      params = lora.merge(params, config.model.lora)
    others = _baselines(config, params)
    texts = Texts(opened.config, workdir)
    # Once for all chunk sizes, and in place of what they were made of.
    params['decoder'] = programs.unstack(params, opened.config.model)
    rows, compile_s, late = [], 0.0, 0
    for chosen in groups(config):
      k = chosen[0].k
      model = dataclasses.replace(opened.config.model, chunk_size=k)
      if chosen[0].saturated:
        chosen = [as_many_as_fit(chosen[0], model, config)]
      start = time.perf_counter()
      engine = _engine(model, config, params, chosen)
      engine.warm_up(_positions(chosen, config))
      compile_s += time.perf_counter() - start
      say(f'bench: k = {k}, {chosen[0].batch} at once: {len(chosen)} cells')
      for cell in chosen:
        with _compiles() as seen:
          row = measure(engine, texts, cell, config)
        row['compiles'] = len(seen)
        late += len(seen)
        rows.append(row)
        say(
          f'bench: {label(row)}, {cell.context} tokens: first token after '
          f'{row["mean_ttft_ms"]:.1f} ms, then {row["mean_tpot_ms"]:.2f} each'
        )
      del engine
    for arm, generate in others.items():
      rows += baselines.rows(config, generate, plain_cells(config, arm))
  limits(rows, opened.config.model, config)
  device = jax.devices()[0]
  out = {
    'device': device.device_kind,
    'devices': len(jax.devices()),
    'cpus': os.cpu_count(),
    'dtype': config.model.compute_dtype,
    'parameters': from_source,
    'versions': environment.versions()
    | {
      name: importlib.metadata.version(name) for name in map(BELOW.get, others)
    },
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    'git': environment.git_commit(),
    'compile_s': compile_s,
    'compiles_after_warmup': late,
    'rows': rows,
  }
  from refrag_jax.serve import bench_page  # matplotlib, which takes its time

  os.makedirs(workdir, exist_ok=True)
  files.write_json(os.path.join(workdir, 'bench.json'), out)
  files.write_text(os.path.join(workdir, 'bench.html'), bench_page.page(out))
  say(f'done: {workdir}/bench.json, {workdir}/bench.html')
  return 0


def check_bench(config: Config) -> None:
  """Refuses cells that cannot be."""
  section = config.bench
  check.positive(
    section, 'bench.', 'question_tokens', 'output_tokens', 'repeats'
  )
  for name in ('contexts', 'batches', 'fractions'):
    if not getattr(section, name):
      raise UserError(f'config.bench.{name} is empty: give one at least')
  sizes = _chunk_sizes(config)
  for name, values in (
    ('contexts', section.contexts), ('chunk_sizes', sizes),
  ):  # fmt: skip
    if any(value <= 0 for value in values):
      raise UserError(f'config.bench.{name} {values} must all be above 0')
  if any(value < 0 for value in section.batches):
    raise UserError(
      f'config.bench.batches {section.batches}: give numbers of requests, or '
      f'{AS_MANY_AS_FIT} for as many as fit'
    )
  if any(not 0 <= p < 1 for p in section.fractions):
    raise UserError(
      f'config.bench.fractions {section.fractions}: use shares from 0 up to 1'
    )
  for k, context in itertools.product(sizes, section.contexts):
    if context % k:
      raise UserError(
        f'config.bench.contexts: {context} tokens are no whole chunks of {k}'
      )
  longest = max(section.contexts) + section.question_tokens
  longest += section.output_tokens
  most = encoder_tokens(config, max(sizes))
  if config.model.encoder.max_length < most:
    raise UserError(
      f'config.bench.chunk_sizes: chunks of {max(sizes)} have up to {most} '
      f'encoder tokens, and the encoder has {config.model.encoder.max_length} '
      'positions (config.model.encoder.max_length)'
    )
  limit = config.model.decoder.max_length
  if 0 < limit < longest:
    raise UserError(
      f'config.bench.contexts: {max(section.contexts)} tokens, the question '
      f'and the answer are {longest} positions, and the decoder has {limit} '
      '(config.model.decoder.max_length)'
    )


def _chunk_sizes(config: Config) -> tuple[int, ...]:
  return config.bench.chunk_sizes or (config.model.chunk_size,)


def encoder_tokens(config: Config, k: int) -> int:
  """M of chunks of k tokens: as many for each as with the config's own k."""
  special = 2
  rest = config.data.max_encoder_tokens - special
  return special + -(-rest * k // config.model.chunk_size)


def groups(config: Config) -> Iterator[list[Cell]]:
  """Cells that one engine measures."""
  for k, batch in itertools.product(_chunk_sizes(config), config.bench.batches):
    chosen = list(cells(config, k, batch))
    if batch == AS_MANY_AS_FIT:
      yield from ([cell] for cell in chosen)
    else:
      yield chosen


def cells(config: Config, k: int, batch: int) -> Iterator[Cell]:
  """The cells of one chunk size and number of requests."""
  full = batch == AS_MANY_AS_FIT
  for context in config.bench.contexts:
    yield Cell('full_context', context, k, 0.0, True, batch, full)
    if not full:
      yield Cell('last_k', context, k, 0.0, True, batch)
    for p in dict.fromkeys(config.bench.fractions):
      for cached in (True,) if full else (True, False):
        yield Cell('refrag', context, k, p, cached, batch, full)


def as_many_as_fit(cell: Cell, model: ModelConfig, config: Config) -> Cell:
  """The cell with the number of slots that the device has room for."""
  slots = jax.eval_shape(
    lambda: programs.new_slots(cfg=model, rows=1, length=_length(cell, config))
  )
  ways = len(jax.devices())
  a_slot = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(slots))
  number = int(free_bytes() * ways // a_slot) // ways * ways
  if number < 1:
    raise UserError(
      f'no slot of {_length(cell, config):,} positions ({a_slot / 1e9:.1f} GB) '
      'fits beside the weights: lower config.bench.contexts'
    )
  return cell._replace(batch=min(number, MOST))


def free_bytes() -> float:
  """What a device has left for slots; of a CPU, its share of the machine's."""
  device = jax.devices()[0]
  stats = device.memory_stats()
  if stats is None:
    pages = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return (1 - KEPT) * pages / len(jax.devices())
  return (1 - KEPT) * stats['bytes_limit'] - stats['bytes_in_use']


def _length(cell: Cell, config: Config) -> int:
  """Positions that the cell's requests take."""
  return cell.read + config.bench.question_tokens + config.bench.output_tokens


def _baselines(config: Config, params: dict) -> dict[str, baselines.Generate]:
  """What is asked for beside the engine, ready to run, arm -> function."""
  out = {}
  if config.bench.transformers:
    from refrag_jax.serve import torch_baseline  # torch, which few have

    model = torch_baseline.load(config, params)
    out['transformers'] = functools.partial(torch_baseline.generate, model)
  if config.bench.llama_cpp:
    from refrag_jax.serve import llama_cpp_baseline

    section = config.bench
    longest = max(section.contexts) + section.question_tokens
    out['llama_cpp'] = llama_cpp_baseline.load(
      section.llama_cpp,
      longest + section.output_tokens,
      config.model.decoder.vocab_size,
    )
  return out


def plain_cells(config: Config, arm: str) -> Iterator[Cell]:
  """A baseline's: full context, which does not depend on k."""
  batches = [x for x in config.bench.batches if x != AS_MANY_AS_FIT]
  for batch, context in itertools.product(batches, config.bench.contexts):
    if arm == 'llama_cpp' and batch > 1:
      continue  # its Python package reads one sequence at a time
    k = _chunk_sizes(config)[0]
    yield Cell(arm, context, k, 0.0, True, batch)


def _params(opened, source: str) -> tuple[dict, str]:
  if source:
    params, _ = session_lib.load_params(opened, source, f'--from={source}')
    return params, source
  groups = list(session_lib.abstract_params(opened))
  return session_lib.fresh_params(opened, groups), 'drawn, not trained'


def _engine(
  model: ModelConfig, config: Config, params: dict, chosen: Sequence[Cell]
) -> Engine:
  """With one pool, of the batch's rows and the longest cell's positions."""
  needed = max(_length(cell, config) for cell in chosen)
  return Engine(
    model, params, -1, [(chosen[0].batch, needed)],
    max(cell.chunks for cell in chosen), encoder_tokens(config, chosen[0].k),
    attend=model.attention,
  )  # fmt: skip


def _positions(chosen: Sequence[Cell], config: Config) -> set[int]:
  """How many any request of these cells has at any time."""
  return {
    x
    for length in (_length(cell, config) for cell in chosen)
    for x in range(length - config.bench.output_tokens, length + 1)
  }


@contextlib.contextmanager
def _compiles() -> Iterator[list[str]]:
  """A list that grows by the name of each function that is compiled."""
  seen = []

  def listen(event: str, seconds: float, **kwargs: Any) -> None:
    del seconds
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append(kwargs.get('fun_name', ''))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


class Texts:
  """Fresh contexts: stretches of the config's text, one after the other."""

  def __init__(self, config: Config, workdir: str):
    session = session_lib.open_data(config, workdir)
    self.tokenizer, corpus = session.tokenizer, session.corpus
    self._cut = lambda text, k: chunking.chunk_passage(
      text, session.tokenizer, tokenizers.load(config.data.encoder_tokenizer),
      k, encoder_tokens(config, k),
    )  # fmt: skip
    self._documents = itertools.cycle(
      map(corpus.document_text, corpus.documents('heldout').tolist())
    )
    self._rest = ''

  def context(self, tokens: int, k: int) -> tuple[chunking.Chunks, float]:
    """The next stretch of so many tokens, and the seconds of cutting it."""
    C, found = tokens // k, None
    while found is None or found.chunk_len_C[:C].sum() < tokens:
      if found is not None or len(self._rest) < 2 * tokens:
        self._rest += next(self._documents) + '\n\n'
      found = self._cut(self._rest[: 16 * tokens], k)
    end = int(found.spans_C2[C - 1, 1])
    start = time.perf_counter()
    self._cut(self._rest[:end], k)
    seconds = time.perf_counter() - start
    self._rest = self._rest[end:]
    return chunking.Chunks(*(x[:C] for x in found)), seconds


def measure(
  engine: Engine, texts: Texts, cell: Cell, config: Config
) -> dict[str, Any]:
  """A row of bench.json."""
  rng = np.random.default_rng((cell.context, cell.k, cell.batch))
  all_times, spans = [], []
  # Each slot is taken twice, so that most of the time all of them are.
  number, turns = cell.batch, config.bench.repeats
  if cell.saturated:
    number, turns = 2 * cell.batch, 1
  for turn in range(1 + turns):
    asked = [_asked(texts, cell, config, rng) for _ in range(number)]
    start = time.perf_counter()
    times = requests(engine, cell, asked, config.bench.output_tokens)
    if turn:  # the first one warms caches
      spans.append(time.perf_counter() - start)
      all_times += times
  seconds = sum(spans)
  number = config.bench.output_tokens
  itl = np.concatenate([np.diff(x.tokens) for x in all_times])
  columns = {
    'ttft': np.array([x.tokens[0] for x in all_times]),
    'tpot': np.array(
      [(x.tokens[-1] - x.tokens[0]) / max(1, number - 1) for x in all_times]
    ),
    'itl': itl,
    'e2el': np.array([x.tokens[-1] for x in all_times]),
  }
  positions = cell.read + config.bench.question_tokens
  steps = {
    name: float(np.mean([x.steps[name] for x in all_times]) * 1e3)
    for name in all_times[0].steps
  }
  if cell.arm == 'refrag':
    steps['project'] = 1e3 * project_seconds(engine, cell, asked[0])
  if cell.batch == 1:  # the others wait for each other
    before = sum(steps.get(x, 0.0) for x in ('encode', 'policy', 'project'))
    steps['prefill'] = float(columns['ttft'].mean() * 1e3) - before
  return {
    'model': config.name,
    **cell._asdict(),
    'question': config.bench.question_tokens,
    'context_tokens': cell.context,
    'decoder_positions': positions,
    'padded_positions': bucket(positions, engine.pools[0].lengths),
    'requests': len(all_times),
    **baselines.statistics_ms(**columns),
    'request_throughput': len(all_times) / seconds,
    'output_throughput': len(all_times) * number / seconds,
    'split_ms': steps,
  }


def _asked(texts, cell: Cell, config: Config, rng) -> tuple:
  """A context, a question of random tokens, and the seconds of cutting."""
  chunks, seconds = texts.context(cell.context, cell.k)
  vocab = min(texts.tokenizer.vocab_size, config.model.decoder.vocab_size)
  question = rng.integers(0, vocab, config.bench.question_tokens)
  return chunks, question.astype(np.int32), seconds


def project_seconds(engine: Engine, cell: Cell, asked: tuple) -> float:
  """From chunk embeddings to the decoder's input, by itself; a median."""
  chunks, question, _ = asked
  c_CE = engine.encode(chunks.encoder_CM, chunks.encoder_len_C)
  prompt = _prompt(engine, cell, chunks, question, c_CE, {})
  length = bucket(prompt.positions(), engine.pools[0].lengths)
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(engine.spliced(prompt, length))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def requests(
  engine: Engine, cell: Cell, asked: Sequence[tuple], number: int
) -> list[Times]:
  """All of them at once, from chunks in hand to the last token."""
  held = [None] * len(asked)
  if cell.arm == 'refrag' and cell.cached:
    held = [engine.encode(x.encoder_CM, x.encoder_len_C) for x, *_ in asked]
    jax.block_until_ready(held)
  out, running = [], []
  for (chunks, question, cut_s), c_CE in zip(asked, held, strict=True):
    start = time.perf_counter()
    steps = {'tokenize': cut_s, 'store': 0.0}
    prompt = _prompt(engine, cell, chunks, question, c_CE, steps)
    running.append(engine.submit(prompt, Options(max_tokens=number)))
    out.append((start, [], steps))
  while not engine.idle:
    engine.step()
    now = time.perf_counter()
    for of, (start, tokens, _) in zip(running, out, strict=True):
      tokens += [now - start] * (len(of.tokens) - len(tokens))
  return [Times(tokens, steps) for _, tokens, steps in out]


def _prompt(
  engine: Engine, cell: Cell, chunks, question, c_CE, steps: dict
) -> Prompt:
  """What the decoder is to read; times what has to be done before."""
  none = Prompt(
    question, chunks.chunks_CK[:0], chunks.chunk_len_C[:0],
    np.zeros((0, engine.cfg.encoder.width), np.float32), np.zeros(0, bool),
    np.zeros(0, np.int32),
  )  # fmt: skip
  if cell.arm != 'refrag':
    last = chunks.chunks_CK.reshape(-1)[-cell.read :]
    return dataclasses.replace(none, prefix=np.concatenate([question, last]))
  C = len(chunks.chunk_len_C)
  if c_CE is None:
    start = time.perf_counter()
    c_CE = engine.encode(chunks.encoder_CM, chunks.encoder_len_C)
    jax.block_until_ready(c_CE)
    steps['encode'] = time.perf_counter() - start
  expand_C = np.zeros(C, bool)
  if cell.expanded:
    start = time.perf_counter()
    score_C = engine.score(c_CE, C)
    expand_C[np.argsort(-score_C, kind='stable')[: cell.expanded]] = True
    steps['policy'] = time.perf_counter() - start
  return Prompt(
    question, chunks.chunks_CK, chunks.chunk_len_C, c_CE, expand_C,
    np.zeros(0, np.int32),
  )  # fmt: skip


# --- What could be ------------------------------------------------------------


def limits(rows: list[dict], model: ModelConfig, config: Config) -> None:
  """Adds to each row its speed-up, what FLOPs allow, and the roofline."""
  flop_rate, byte_rate = rates(model.compute_dtype)
  among = lambda row: (
    row['context'], row['k'], 'fit' if row['saturated'] else row['batch']
  )  # fmt: skip
  base = {among(row): row for row in rows if row['arm'] == 'full_context'}
  bound = lambda cost, moved: (
    1e3 * max(cost / flop_rate, moved / byte_rate) or None
  )
  for row in rows:
    cost, moved = first_token_cost(row, model, config)
    row['bytes_moved'] = moved
    row['roofline_ms'] = bound(cost, moved)
    row['tpot_roofline_ms'] = bound(*next_token_cost(row, model, config))
    full = base.get(among(row))
    if full is None:
      continue
    row['throughput_ratio'] = (
      row['request_throughput'] / full['request_throughput']
    )
    if row['saturated']:  # a first token waits for a slot there
      continue
    row['speedup'] = full['mean_ttft_ms'] / row['mean_ttft_ms']
    row['flop_limit'] = first_token_cost(full, model, config)[0] / cost
    row['fraction_of_limit'] = row['speedup'] / row['flop_limit']


def first_token_cost(
  row: dict, model: ModelConfig, config: Config
) -> tuple[float, float]:
  """FLOPs and bytes of one request's first token, its own work alone."""
  decoder, encoder = vars(model.decoder), vars(model.encoder)
  itemsize = jnp.dtype(model.compute_dtype).itemsize
  positions, chunks = row['decoder_positions'], row['context'] // row['k']
  head = decoder['width'] * decoder['vocab_size']
  cost = flops.decoder_flops(decoder, positions) + 2 * head
  weights, key_values = _sizes(model)
  moved = weights + positions * key_values
  if row['arm'] == 'refrag':
    cost += flops.projection_flops(encoder, decoder, chunks)
    moved += chunks * encoder['width']
    if row['p']:
      cost += flops.policy_flops(vars(model.policy), encoder, chunks)
    if not row['cached']:
      length = encoder_tokens(config, row['k'])
      cost += flops.encoder_flops(encoder, chunks, length)
      moved += flops.encoder_flops(encoder, 1, 1) / 2
  return float(cost), float(moved * itemsize)


def next_token_cost(
  row: dict, model: ModelConfig, config: Config
) -> tuple[float, float]:
  """FLOPs and bytes of one step of all requests, halfway through an answer."""
  decoder, batch = model.decoder, row['batch']
  positions = row['decoder_positions'] + config.bench.output_tokens / 2
  weights, key_values = _sizes(model)
  query = decoder.num_layers * decoder.num_heads * decoder.head_dim
  cost = batch * (2 * weights + 4 * positions * query)
  moved = weights + batch * positions * key_values
  return cost, moved * jnp.dtype(model.compute_dtype).itemsize


def _sizes(model: ModelConfig) -> tuple[float, int]:
  """Numbers in the decoder's matrices, and in a position's keys and values."""
  decoder = model.decoder
  head = decoder.width * decoder.vocab_size
  key_values = 2 * decoder.num_kv_heads * decoder.head_dim
  weights = flops.decoder_flops(vars(decoder), 1) / 2 + head
  return weights, decoder.num_layers * key_values


def rates(dtype: str) -> tuple[float, float]:
  """FLOP/s and bytes/s of one device: data sheet, or on a CPU measured.

  What is not known is no bound: infinite. Data sheets are of bfloat16.
  """
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return progress.measure_matmul_flops(), _copy_rate()
  chip = chips.of_device(device.device_kind) or chips.CHIPS['cpu']
  known = lambda rate: math.inf if math.isnan(rate) else rate
  flop_rate = known(chip.flops) if dtype == 'bfloat16' else math.inf
  return flop_rate, known(chip.hbm_rate)


def _copy_rate(size: int = 1 << 26, repeats: int = 5) -> float:
  """Bytes per second that this CPU reads and writes."""
  x = jnp.zeros(size, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  add(x).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    add(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * x.nbytes / min(seconds)
