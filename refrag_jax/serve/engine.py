"""The engine: many requests at once, each joining and leaving as it comes.

Dimension key: B slots of a pool, C chunks, K chunk size, T positions of a
prefill, S positions of a slot, E encoder width, V vocabulary.

A request holds one slot of a pool from its prefill to its last token. A loop of
two moves: admit what waits where a slot is free (one prefill each), then one
decode step for every slot that is taken. Tokens are read a step late, so that
the devices never wait for the host; what a finished row has computed meanwhile
is not looked at. Lengths are rounded up to 2^n or 1.5 * 2^n, every program of
such a length is compiled by `warm_up`, and none after it.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from refrag_jax.config.schema import ModelConfig
from refrag_jax.errors import UserError
from refrag_jax.models import lora
from refrag_jax.models.refrag import Refrag
from refrag_jax.serve import programs, sampling

SHORTEST = 16  # the least length that programs are made for


@dataclasses.dataclass(frozen=True)
class Options:
  """How a request is answered; see sampling.Settings."""

  max_tokens: int = 64
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def checked(self) -> 'Options':
    """Itself.

    Raises:
      UserError: a value is out of its range, or no number.
    """
    for name, (least, most, what) in _RANGES.items():
      value = getattr(self, name)
      kind = int if isinstance(getattr(Options, name), int) else (int, float)
      if (
        isinstance(value, bool)
        or not isinstance(value, kind)
        or not least <= value <= most  # NaN is not
      ):
        raise UserError(f'{name} is {value!r}: use {what}')
    return self


_RANGES = {
  'max_tokens': (1, 1 << 30, 'a whole number from 1 on'),
  'temperature': (0, 1e3, 'a number from 0 on (0: the likeliest token)'),
  'top_k': (0, (1 << 31) - 1, 'a whole number from 0 on (0: all tokens)'),
  'top_p': (1e-9, 1, 'a number above 0, at most 1'),
  'min_p': (0, 1, 'a number from 0 to 1'),
  'repetition_penalty': (1e-3, 1e3, 'a number above 0 (1: none)'),
  'seed': (0, (1 << 32) - 1, 'a whole number from 0 to 2^32 - 1'),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A request as the decoder will read it; ids on the host."""

  prefix: np.ndarray  # int32 (Q,), at least one
  chunks_CK: np.ndarray  # int32, decoder ids
  chunk_len_C: np.ndarray  # int32, all above 0
  # Chunk embeddings before the projection, float32; on the devices, where they
  # have as many rows as `Engine.chunk_lengths` has for them.
  c_CE: np.ndarray | jax.Array
  expand_C: np.ndarray  # bool, chunks that stay tokens
  given: np.ndarray  # int32 (O,), what stands before the answer

  def positions(self) -> int:
    """Positions of the decoder that it takes."""
    as_tokens = np.where(self.expand_C, self.chunk_len_C, 1).sum()
    return len(self.prefix) + int(as_tokens) + len(self.given)


@dataclasses.dataclass(eq=False)
class Running:
  """A request that was submitted, and what has been written of its answer."""

  prompt: Prompt
  options: Options
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finish: str = ''  # '' while it runs; 'stop', 'length' or 'cancelled'
  asked: int = 0  # tokens that the devices were told to write

  def position(self) -> int:
    """Where the token stands that the decoder reads next."""
    return self.prompt.positions() + self.asked - 1


class Pool:
  """Slots of one length, and who has them."""

  def __init__(self, cfg: ModelConfig, rows: int, length: int):
    self.length, self.lengths = length, lengths(length)
    self.slots = programs.new_slots(cfg=cfg, rows=rows, length=length)
    self.running: list[Running | None] = [None] * rows
    # What was dispatched and not read: the rows it was for, tokens, logprobs.
    self.unread: list[tuple[dict[int, Running], Any, Any]] = []

  def free(self) -> int | None:
    """A slot that nobody has, or None."""
    return next((b for b, r in enumerate(self.running) if r is None), None)

  def settings(self) -> sampling.Settings:
    """Each slot's, in arrays of their own: the devices may be late to read."""
    return settings_of([r.options if r else Options() for r in self.running])


def settings_of(options: Sequence[Options]) -> sampling.Settings:
  """Settings as arrays, one entry an option."""
  column = lambda name, kind: np.array(
    [getattr(o, name) for o in options], kind
  )
  return sampling.Settings(
    column('temperature', np.float32),
    column('top_k', np.int32),
    column('top_p', np.float32),
    column('min_p', np.float32),
    column('repetition_penalty', np.float32),
    column('seed', np.uint32),
  )


def lengths(longest: int) -> list[int]:
  """2^n and 1.5 * 2^n from SHORTEST up, and `longest` as the last."""
  out, n = [], SHORTEST
  while n < longest:
    out += [n, n * 3 // 2]
    n *= 2
  return [x for x in out if x < longest] + [longest]


def bucket(number: int, among: Sequence[int]) -> int:
  """The least length that holds `number`."""
  return next(x for x in among if x >= number)


def _rows(x: np.ndarray, rows: int) -> np.ndarray:
  """The array with zeros behind it, up to so many rows."""
  return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


class Engine:
  """Answers prompts with one model on the current mesh.

  Args:
    cfg: the model's numbers.
    params: its parameters, as a checkpoint gives them; those of the decoder may
      be programs.Weights already.
    eos_id: the token that ends an answer.
    pools: (slots, positions of a slot) of each.
    max_chunks: the most chunks of a prompt.
    max_encoder_tokens: M, encoder tokens of a chunk.
    attend: how attention is computed, of attention.KINDS.
    int8: keep the decoder's matrices in 8 bits; programs.Weights stay as they
      are.
  """

  def __init__(
    self, cfg: ModelConfig, params: dict, eos_id: int,
    pools: Sequence[tuple[int, int]], max_chunks: int, max_encoder_tokens: int,
    attend: str = 'dense', int8: bool = False,
  ):  # fmt: skip
    if 'lora' in params:
      params = lora.merge(params, cfg.lora)
    # Here attention is the programs' matter, and so are the layers.
    cfg = dataclasses.replace(
      cfg, attention='dense', lora=dataclasses.replace(cfg.lora, rank=0)
    )
    self.cfg, self.eos_id, self.attend = cfg, eos_id, attend
    mesh, self._everywhere = jax.sharding.get_mesh(), None
    if not mesh.empty:
      self._everywhere = NamedSharding(mesh, PartitionSpec())
    self.model = Refrag(cfg)
    self.small = {x: params[x] for x in ('encoder', 'projection', 'policy')}
    self.weights = params['decoder']
    if not isinstance(self.weights, programs.Weights):
      self.weights = programs.unstack(params, cfg, int8)
    self.pools = [Pool(cfg, *of) for of in sorted(pools, key=lambda p: p[1])]
    self.longest = max(pool.length for pool in self.pools)
    # Lengths of the texts that chunks are scored by, token by token.
    self._texts = lengths(max_chunks * cfg.chunk_size) if max_chunks else [0]
    self.max_encoder_tokens = max_encoder_tokens
    self.chunk_lengths = [0, *lengths(max_chunks)] if max_chunks else [0]
    self.waiting: collections.deque[Running] = collections.deque()

  # --- Chunks -----------------------------------------------------------------

  def check_chunks(self, number: int) -> None:
    """Refuses more chunks in one request than the programs have room for."""
    if number > self.chunk_lengths[-1]:
      raise UserError(
        f'the request has {number} chunks, and the engine was made for '
        f'{self.chunk_lengths[-1]}: bring fewer passages'
      )

  def encode(
    self, encoder_CM: np.ndarray, encoder_len_C: np.ndarray
  ) -> jax.Array:
    """c_i of a request's chunks; of as many rows as `chunk_lengths` has."""
    slots = bucket(len(encoder_len_C), self.chunk_lengths)
    return programs.encode(
      self.small, _rows(encoder_CM, slots), _rows(encoder_len_C, slots),
      model=self.model,
    )  # fmt: skip

  def score(self, c_CE: jax.Array, number: int) -> np.ndarray:
    """The policy's logit of each of the first `number` chunks, (number,)."""
    valid_C = np.arange(len(c_CE)) < number
    score_C = programs.score(self.small, c_CE, valid_C, model=self.model)
    return np.asarray(score_C)[:number]

  def token_nll(self, ids: np.ndarray, first: int) -> np.ndarray:
    """NLL of each token of a text behind `first`, by the decoder."""
    padded_T = _rows(np.asarray(ids, np.int32), bucket(len(ids), self._texts))
    nll_T = programs.token_nll(
      self.weights, padded_T, np.int32(first), cfg=self.cfg.decoder,
      attend=self.attend,
    )  # fmt: skip
    return np.asarray(nll_T)[: len(ids)]

  # --- Requests ---------------------------------------------------------------

  def submit(self, prompt: Prompt, options: Options) -> Running:
    """Puts a request at the end of those that wait.

    Raises:
      UserError: no pool has so many positions, or there are too many chunks.
    """
    self.check_chunks(len(prompt.chunk_len_C))
    needed = prompt.positions() + options.max_tokens
    if needed > self.longest:
      raise UserError(
        f'the request takes {prompt.positions()} positions and up to '
        f'{options.max_tokens} tokens of an answer, together {needed}, and a '
        f'slot has {self.longest}: shorten the passages, expand fewer chunks, '
        'or ask for fewer tokens'
      )
    running = Running(prompt, options)
    self.waiting.append(running)
    return running

  def cancel(self, running: Running) -> None:
    """Ends a request; its slot is free for the next one."""
    if running in self.waiting:
      self.waiting.remove(running)
    self._finish(running, 'cancelled')

  def warm_up(self, positions: Iterable[int] = ()) -> None:
    """Compiles, and runs, every program that a request can ask for.

    Nothing may be running.

    Args:
      positions: how many the requests will have, from their prompts on to the
        last token of the answer; (): any.
    """
    positions = list(positions)
    k, E = self.cfg.chunk_size, self.cfg.encoder.width
    for C in self.chunk_lengths[1:]:
      ids_CM = np.zeros((C, self.max_encoder_tokens), np.int32)
      self.score(self.encode(ids_CM, np.ones(C, np.int32)), C)
    for pool in self.pools:
      nobody_B = np.zeros(len(pool.running), bool)
      asked = {bucket(x, pool.lengths) for x in positions if x <= pool.length}
      for length in sorted(asked) or pool.lengths:
        fewest = [0, *(x + 1 for x in self.chunk_lengths)]
        for C, least in zip(self.chunk_lengths, fewest, strict=False):
          if least + 1 > length:  # with a token before them
            continue
          prompt = Prompt(
            np.ones(1, np.int32), np.ones((C, k), np.int32),
            np.ones(C, np.int32), np.zeros((C, E), np.float32),
            np.zeros(C, bool), np.zeros(0, np.int32),
          )  # fmt: skip
          x_1TD, number = self.spliced(prompt, length)
        pool.slots, *_ = programs.prefill(
          self.weights, pool.slots, np.int32(0), x_1TD, number,
          np.zeros(self.cfg.decoder.vocab_size, bool),
          settings_of([Options()]), cfg=self.cfg.decoder, attend=self.attend,
        )  # fmt: skip
        pool.slots, *_ = programs.decode(
          self.weights, pool.slots, nobody_B, pool.settings(),
          cfg=self.cfg.decoder, attend=self.attend, live=length,
        )  # fmt: skip

  @property
  def idle(self) -> bool:
    """Whether there is nothing to do."""
    return not self.waiting and not any(
      any(pool.running) or pool.unread for pool in self.pools
    )

  def step(self) -> list[Running]:
    """Admits, decodes, and reads what the step before has written.

    Returns:
      The requests that got a token, or that ended.
    """
    self._admit()
    news = []
    for pool, went in [(pool, self._decode(pool)) for pool in self.pools]:
      # All but what the devices are still at.
      while len(pool.unread) > went:
        news += self._read(*pool.unread.pop(0))
    return news

  def run(self) -> Iterator[list[Running]]:
    """Steps until there is nothing to do."""
    while not self.idle:
      yield self.step()

  # --- The loop ---------------------------------------------------------------

  def _admit(self) -> None:
    """Prefills what waits, first come first served, where a slot is free."""
    while self.waiting:
      running = self.waiting[0]
      needed = running.prompt.positions() + running.options.max_tokens
      pool = next(
        (p for p in self.pools
         if p.length >= needed and p.free() is not None), None
      )  # fmt: skip
      if pool is None:
        return
      self.waiting.popleft()
      self._prefill(pool, pool.free(), running)

  def _prefill(self, pool: Pool, row: int, running: Running) -> None:
    prompt = running.prompt
    number = prompt.positions()
    x_1TD, length = self.spliced(prompt, bucket(number, pool.lengths))
    seen_V = np.zeros(self.cfg.decoder.vocab_size, bool)
    K = self.cfg.chunk_size
    read_CK = np.arange(K) < prompt.chunk_len_C[:, None]
    read_CK &= prompt.expand_C[:, None]
    for ids in (prompt.prefix, prompt.given, prompt.chunks_CK[read_CK]):
      seen_V[ids] = True
    pool.slots, token_1, logprob_1 = programs.prefill(
      self.weights, pool.slots, np.int32(row), x_1TD, length, seen_V,
      settings_of([running.options]), cfg=self.cfg.decoder, attend=self.attend,
    )  # fmt: skip
    pool.running[row], running.asked = running, 1
    pool.unread.append(({0: running}, token_1, logprob_1))

  def spliced(self, prompt: Prompt, length: int) -> tuple[jax.Array, jax.Array]:
    """The decoder's input, (1, T, D), and how much of its `length` there is."""
    C = len(prompt.chunk_len_C)
    slots = bucket(C, self.chunk_lengths)
    row = lambda ids: (
      _rows(np.asarray(ids, np.int32), self.longest)[None],
      np.array([len(ids)], np.int32),
    )
    prefix_BQ, prefix_len_B = row(prompt.prefix)
    output_BO, output_len_B = row(prompt.given)
    batch = {
      'prefix_BQ': prefix_BQ,
      'prefix_len_B': prefix_len_B,
      'chunks_BCK': _rows(prompt.chunks_CK, slots)[None],
      'chunk_len_BC': _rows(prompt.chunk_len_C, slots)[None],
      'output_BO': output_BO,
      'output_len_B': output_len_B,
    }
    c_CE = prompt.c_CE
    if len(c_CE) != slots:  # on the host, where no length is a program
      c_CE = _rows(np.asarray(c_CE, np.float32)[:C], slots)
    # Wherever they come from, the program that reads them is the same one.
    c_CE = jax.device_put(c_CE, self._everywhere)
    return programs.spliced(
      self.small, self.weights.embed_VD, batch, c_CE,
      _rows(prompt.expand_C, slots), model=self.model, length=length,
    )  # fmt: skip

  def _decode(self, pool: Pool) -> bool:
    """One token more for every row that is to have one; whether any is."""
    rows = {
      b: running
      for b, running in enumerate(pool.running)
      if running is not None and running.asked < running.options.max_tokens
    }
    if not rows:
      return False
    active_B = np.array([b in rows for b in range(len(pool.running))])
    live = bucket(1 + max(r.position() for r in rows.values()), pool.lengths)
    pool.slots, token_B, logprob_B = programs.decode(
      self.weights, pool.slots, active_B, pool.settings(),
      cfg=self.cfg.decoder, attend=self.attend, live=live,
    )  # fmt: skip
    for running in rows.values():
      running.asked += 1
    pool.unread.append((rows, token_B, logprob_B))
    return True

  def _read(self, rows: dict[int, Running], tokens, logprobs) -> list[Running]:
    tokens, logprobs = jax.device_get((tokens, logprobs))
    news = []
    for b, running in rows.items():
      if running.finish:  # it ended after this was asked for
        continue
      running.tokens.append(int(tokens[b]))
      running.logprobs.append(float(logprobs[b]))
      news.append(running)
      if running.tokens[-1] == self.eos_id:
        self._finish(running, 'stop')
      elif len(running.tokens) == running.options.max_tokens:
        self._finish(running, 'length')
    return news

  def _finish(self, running: Running, why: str) -> None:
    running.finish = running.finish or why
    for pool in self.pools:
      pool.running = [None if r is running else r for r in pool.running]
