"""Answers to questions over passages: what a Python program calls.

  from refrag_jax import Refrag
  model = Refrag.from_pretrained('runs/tiny/checkpoints/sft')
  answer = model.answer('What is it?', ['A passage.', 'Another.'], expand=0.25)
  print(answer.text)

Dimension key: C chunks of all passages of one question.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import session as session_lib
from refrag_jax.config.load import build
from refrag_jax.config.schema import ANY_DEVICES, Config
from refrag_jax.data import tokenizers
from refrag_jax.data.passages import Passage
from refrag_jax.errors import UserError
from refrag_jax.hf import found
from refrag_jax.serve import expansion, requests
from refrag_jax.serve.engine import Engine, Options, Prompt, Running
from refrag_jax.serve.text import Writer


class Chunk(NamedTuple):
  """One chunk of a context, and what became of it."""

  passage: int  # of the passages that were read
  text: str
  tokens: int
  score: float | None  # of the selector; None where nobody asked it
  expanded: bool  # whether the decoder saw its tokens, or one embedding


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was written, and from what."""

  text: str
  finish: str  # 'stop', 'length' or 'cancelled'
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]  # of each token, log-softmax of the logits
  trace: tuple[Chunk, ...]
  passages: tuple[Passage, ...]  # those that were read
  context_tokens: int
  positions: int  # of the decoder before the answer
  seconds_to_first: float  # from the question in hand to the first token
  seconds: float  # to the last one
  notes: tuple[str, ...]  # what was left out or cut short

  @property
  def rate(self) -> float:
    """Tokens of the context for each position that the decoder read of it."""
    read = sum(chunk.tokens if chunk.expanded else 1 for chunk in self.trace)
    return self.context_tokens / read if read else 1.0


class Asked(NamedTuple):
  """A question on its way through the engine."""

  running: Running
  writer: Writer
  request: requests.Request
  scores: np.ndarray | None
  start: float
  times: list[float]  # of each token that was seen, after the start


class Stream:
  """An answer's text in pieces; `answer` is the whole, when they have come."""

  def __init__(self, pieces: Iterator[str], whole: Callable[[], Answer]):
    self._pieces, self._whole = pieces, whole

  def __iter__(self) -> Iterator[str]:
    return self._pieces

  @property
  def answer(self) -> Answer:
    for _ in self._pieces:
      pass
    return self._whole()


class Refrag:
  """A trained model with an engine round it.

  Args:
    config: of the run that trained it.
    params: the parameters of all groups.
    trained: the groups that are not fresh.
    mesh: the devices.
    pools: (requests at once, positions of each) of one pool or several; a
      request goes where it fits best. Positions are question, context and
      answer together; 0: as many as the decoder has, 2,048 at most.
    max_chunks: the most chunks of one context; 0: as many as positions.
    int8: keep the decoder's matrices in 8 bits, a quarter of float32's memory.
  """

  def __init__(
    self, config: Config, params: dict, trained: Sequence[str],
    mesh: jax.sharding.Mesh, pools: Sequence[tuple[int, int]] = ((4, 0),),
    max_chunks: int = 0, int8: bool = False,
  ):  # fmt: skip
    limit = config.model.decoder.max_length
    whole = min(limit or 2048, 2048)
    pools = [(slots, positions or whole) for slots, positions in pools]
    longest = max((positions for _, positions in pools), default=0)
    if not pools or min(map(min, pools)) < 1:
      raise UserError(
        f'pools {pools}: give (requests at once, positions of each), each of '
        'them 1 or more'
      )
    if limit and longest > limit:
      raise UserError(
        f'{longest} positions are asked for, and the decoder has {limit} '
        '(config.model.decoder.max_length)'
      )
    self.config, self.trained, self._mesh = config, tuple(trained), mesh
    self.tokenizer = tokenizers.load(config.data.tokenizer)
    self.read = requests.Reader(
      config, self.tokenizer, tokenizers.load(config.data.encoder_tokenizer)
    )
    with jax.set_mesh(mesh):
      self.engine = Engine(
        config.model, params, self.tokenizer.eos_id, pools,
        max_chunks or longest, config.data.max_encoder_tokens,
        attend=config.model.attention, int8=int8,
      )  # fmt: skip

  @classmethod
  def from_pretrained(cls, source: str, **options: Any) -> 'Refrag':
    """The model of a checkpoint or an export.

    Args:
      source: RUN/checkpoints/STAGE, or a directory that --mode=export wrote.
      **options: pools, max_chunks, int8, as above.

    Raises:
      UserError: there is none, or its config is not beside it.
    """
    saved = found.saved_config(source)
    if saved is None:
      raise UserError(
        f'{source} is neither RUN/checkpoints/STAGE with the config of that '
        'run nor a directory that --mode=export wrote'
      )
    # Whatever it was trained on: here are other devices.
    config = dataclasses.replace(build(saved[1]), mesh=ANY_DEVICES)
    return cls.of_config(config, source, **options)

  @classmethod
  def of_config(cls, config: Config, source: str, **options: Any) -> 'Refrag':
    """The model of any source of parameters, with a config of one's own."""
    opened = session_lib.settle_attention(session_lib.open_model(config))
    with jax.set_mesh(opened.mesh):
      params, trained = session_lib.load_params(
        opened, source, f'answering from {source}'
      )
    return cls(opened.config, params, trained, opened.mesh, **options)

  def warm_up(self) -> None:
    """Compiles every program, so that no request waits for that."""
    with jax.set_mesh(self._mesh):
      self.engine.warm_up()

  def answer(
    self,
    question: str,
    passages: Sequence[str | Passage | Mapping] = (),
    *,
    stream: bool = False,
    **how: Any,
  ) -> Answer | Stream:
    """Answers a question from passages, or from nothing.

    Args:
      passages: texts, or objects with "text", "title" and "id".
      stream: give the text out as it comes.
      **how: as in `submit`.

    Raises:
      UserError: something of it cannot be answered.
    """
    asked = self.submit(question, passages, **how)
    pieces = self._pieces(asked)
    answer = Stream(pieces, lambda: self.result(asked))
    return answer if stream else answer.answer

  def answer_batch(
    self, questions: Sequence[tuple[str, Sequence]], **how: Any
  ) -> list[Answer]:
    """Answers to several (question, passages), as many at once as fit."""
    asked = [self.submit(*of, **how) for of in questions]
    while not all(of.running.finish for of in asked):
      self.step(asked)
    self.step(asked)  # what others brought to its end
    return [self.result(of) for of in asked]

  def submit(
    self, question: str, passages: Sequence = (), *, expand: float | str = 0.0,
    selector: str = '', per_passage: int = 0, stop: Sequence[str] = (),
    **options: Any,
  ) -> Asked:  # fmt: skip
    """Puts a question into the engine's queue; `step` moves it on.

    Args:
      expand: what stays tokens, as in expansion.budget.
      selector: of expansion.SELECTORS; '': the policy where it was trained,
        else the last chunks.
      per_passage: the most chunks of one passage that stay tokens; 0: all.
      stop: strings that end the answer, and are not part of it.
      **options: of engine.Options.
    """
    start = time.monotonic()
    most = expansion.budget(expand)
    selector = selector or ('rl' if 'policy' in self.trained else 'last')
    self._check_selector(selector)
    options = Options(**options).checked()
    request = self.read(question, passages)
    C = len(request.chunk_len_C)
    self.engine.check_chunks(C)
    with jax.set_mesh(self._mesh):
      width = self.config.model.encoder.width
      c_CE, scores = np.zeros((0, width), np.float32), None
      chosen_C = np.zeros(C, bool)
      if C:
        c_CE = self.engine.encode(request.encoder_CM, request.encoder_len_C)
      if C and any(most):
        scores = self._scores(selector, request, c_CE, options.seed)
        chosen_C = expansion.expanded(scores, request, most, per_passage)
      if not chosen_C.all() and 'projection' not in self.trained:
        raise UserError(
          'this model has no trained projection, so that chunks mean nothing '
          'to its decoder: train the stage reconstruct, or expand all (1.0)'
        )
      prompt = Prompt(
        request.prefix, request.chunks_CK, request.chunk_len_C, c_CE, chosen_C,
        request.given,
      )  # fmt: skip
      running = self.engine.submit(prompt, options)
    writer = Writer(self.tokenizer, stop)
    return Asked(running, writer, request, scores, start, [])

  def step(self, asked: Sequence[Asked]) -> dict[int, str]:
    """Moves the engine on by a token; what is new of each, by its place.

    Whoever moved the engine meanwhile: nothing that was written is lost.
    """
    with jax.set_mesh(self._mesh):
      self.engine.step()
    found = {place: self._take(of) for place, of in enumerate(asked)}
    return {place: text for place, text in found.items() if text}

  def _take(self, asked: Asked) -> str:
    """The text of the tokens that nobody has taken yet."""
    running, writer = asked.running, asked.writer
    fresh = running.tokens[len(asked.times) :]
    asked.times.extend([time.monotonic() - asked.start] * len(fresh))
    if fresh[-1:] == [self.engine.eos_id]:
      fresh = fresh[:-1]
    text = writer.take(fresh) if fresh else ''
    if writer.closed and not running.finish:
      running.finish = 'stop'
      self.engine.cancel(running)
    return text + (writer.end() if running.finish else '')

  def result(self, asked: Asked) -> Answer:
    """The answer, as far as it was written."""
    running, request = asked.running, asked.request
    prompt = running.prompt
    scores = [None] * len(request.text_C)
    if asked.scores is not None:
      scores = np.asarray(asked.scores, float).tolist()
    trace = tuple(
      Chunk(int(p), text, int(size), score, bool(expanded))
      for p, text, size, score, expanded in zip(
        request.passage_C, request.text_C, request.chunk_len_C, scores,
        prompt.expand_C, strict=True,
      )
    )  # fmt: skip
    return Answer(
      text=asked.writer.text,
      finish=running.finish,
      tokens=tuple(running.tokens),
      logprobs=tuple(running.logprobs),
      trace=trace,
      passages=request.passages,
      context_tokens=int(request.chunk_len_C.sum()),
      positions=prompt.positions(),
      seconds_to_first=asked.times[0] if asked.times else 0.0,
      seconds=asked.times[-1] if asked.times else 0.0,
      notes=request.notes,
    )

  def _pieces(self, asked: Asked) -> Iterator[str]:
    try:
      while True:
        if new := self._take(asked):
          yield new
        elif asked.running.finish:
          return
        else:
          self.step([])
    finally:  # whoever reads has enough
      if not asked.running.finish:
        self.engine.cancel(asked.running)

  def _check_selector(self, selector: str) -> None:
    if selector not in expansion.SELECTORS:
      raise UserError(
        f'selector is {selector!r}: there are {", ".join(expansion.SELECTORS)}'
      )
    if selector == 'rl' and 'policy' not in self.trained:
      raise UserError(
        'selector rl needs a policy, which this checkpoint has none of: take '
        'one of the stage grpo, or another selector'
      )

  def _scores(
    self, selector: str, request: requests.Request, c_CE, seed: int
  ) -> np.ndarray:
    """Of each chunk, higher is better, (C,)."""
    C = len(request.chunk_len_C)
    if selector == 'rl':
      return self.engine.score(c_CE, C)
    if selector == 'last':
      return np.arange(C)
    if selector == 'random':
      return np.random.default_rng(seed).random(C)
    there_CK = (
      np.arange(request.chunks_CK.shape[1]) < (request.chunk_len_C[:, None])
    )
    ids = request.chunks_CK[there_CK]
    nll_T = self.engine.token_nll(ids, self.tokenizer.bos_id)
    first_C = np.cumsum(request.chunk_len_C) - request.chunk_len_C
    return np.add.reduceat(nll_T, first_C) / request.chunk_len_C
