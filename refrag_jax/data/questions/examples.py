"""Questions over passages as refrag batches, in a prompt template.

Records (records.py) become what the decoder is given, with the templates of
the config:

  prefix    BOS, question_template
  context   passage_template of each passage, chunked on its own
  output    answer_template (given, no loss), the answer and EOS (loss)

Passage p owns the chunks from p * passage_chunks to (p + 1) * passage_chunks;
what it does not fill has length 0. No chunk ever straddles two passages.

Dimension key:
  B: batch   C: chunks (num_passages * passage_chunks)   K: chunk size
  M: encoder tokens of a chunk   Q: prefix tokens   O: output tokens
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from refrag_jax.data import chunking
from refrag_jax.data.questions import records as questions_lib
from refrag_jax.data.questions import retrieval
from refrag_jax.data.questions.records import fill
from refrag_jax.data.text import corpus
from refrag_jax.errors import UserError

# Which passages a question is shown with.
#   none              no passage
#   given             the record's own, in the record's order
#   gold              the gold passage alone
#   gold_distractors  the gold passage and others of the record, in random order
#   bm25              the best of all passages by BM25, best first
#   shuffled          another question's gold_distractors (given, without gold)
KINDS = ('none', 'given', 'gold', 'gold_distractors', 'bm25', 'shuffled')

# Shares of these in training where the gold passage is known; where it is not,
# all of it is `given`. Mostly the setting that is asked for in the end: several
# passages, one of which matters, at any place. BM25's mistakes are the rest,
# and single passages keep the answer from being always a matter of choosing.
TRAINING_MIX = {'gold_distractors': 0.7, 'bm25': 0.2, 'gold': 0.1}


@dataclasses.dataclass(frozen=True)
class Question:
  """A record, tokenised but for its passages."""

  question: str
  answers: tuple[str, ...]  # all right; the first is the reference
  kind: str  # what is asked, '' where the record does not say
  document: int  # the unit of standard errors
  prefix: np.ndarray  # int32[<= Q]
  output: np.ndarray  # int32[<= O]
  given: tuple[int, ...]  # numbers of passages, the record's order
  gold: int | None  # the first gold one


@dataclasses.dataclass(frozen=True)
class Source:
  """One split's questions, and the batches made of them."""

  questions: tuple[Question, ...]
  passages: tuple[tuple[str, str], ...]  # (title, text)
  skipped: tuple[str, ...]  # what was left out or cut, and why, with counts
  config: Any  # DataConfig
  chunk_size: int
  answer_prompt: int  # the first so many output tokens are given
  tokenizer: Any
  encoder_tokenizer: Any

  @property
  def kinds(self) -> tuple[str, ...]:
    """The `KINDS` that these records allow."""
    known = any(question.gold is not None for question in self.questions)
    return tuple(k for k in KINDS if known or not k.startswith('gold'))

  def batch(
    self, seed: int, step: int, rows: Iterable[int]
  ) -> dict[str, np.ndarray]:
    """A training batch: a pure function of (seed, step) and the row.

    Args:
      seed: the run's.
      step: the step's number.
      rows: numbers of the rows wanted, of the global batch.

    Returns:
      The batch, a dict of arrays (see the module's docstring); row r is the
      same whatever other rows are asked for.
    """
    return self._stack(self._draw(seed, step, row) for row in rows)

  def examples(self, kind: str, n: int) -> dict[str, np.ndarray]:
    """The same first `n` questions for every kind, for paired comparisons.

    What is asked takes turns; within that, questions are in the order of their
    hash. Questions without a gold passage are left out where others have one.

    Returns:
      The fields of data/batch.py for up to n rows, (n, ...).

    Raises:
      UserError: there are no questions of that kind.
    """
    if kind not in self.kinds:
      raise UserError(
        f'{self.config.questions}: no passage is marked "gold": true, so'
        f' there are no examples of kind {kind!r}'
        f' (there are {", ".join(self.kinds)})'
      )
    chosen = self._evaluated[:n]
    # A stream of their own: the distractors are those of the same question
    # whatever n is.
    rngs = [np.random.default_rng((number, 1)) for number in chosen]
    return self._stack(
      (number, self._choose(number, kind, rng))
      for number, rng in zip(chosen, rngs)
    )

  def _draw(self, seed, step, row) -> tuple[int, list[int]]:
    rng = np.random.default_rng((seed, step, row))
    # What is asked is drawn first, so that no kind of question drowns another.
    asked = sorted(self._by_kind)
    pool = self._by_kind[asked[rng.integers(len(asked))]]
    number = pool[rng.integers(len(pool))]
    kind = 'given'
    if self.questions[number].gold is not None:
      kind = rng.choice(list(TRAINING_MIX), p=list(TRAINING_MIX.values()))
    return number, self._choose(number, kind, rng)

  def _choose(self, number, kind, rng) -> list[int]:
    """Numbers of the passages that question `number` is shown with."""
    question, most = self.questions[number], self.config.num_passages
    if kind == 'none':
      return []
    if kind == 'given':
      return list(question.given[:most])
    if kind == 'gold':
      return [question.gold]
    if kind == 'bm25':
      return retrieval.top_k(self._index, question.question, most).tolist()
    if kind == 'shuffled':
      # Of another document, where there is one: neighbours share passages.
      for _ in range(100):
        other = self._evaluated[rng.integers(len(self._evaluated))]
        if self.questions[other].document != question.document:
          break
      known = self.questions[other].gold is not None
      return self._choose(other, 'gold_distractors' if known else 'given', rng)
    distractors = [p for p in question.given if p != question.gold]
    chosen = rng.permutation(distractors)[: most - 1].astype(int).tolist()
    chosen.insert(rng.integers(len(chosen) + 1), question.gold)
    return chosen

  def _stack(self, rows) -> dict[str, np.ndarray]:
    data, pad = self.config, self.tokenizer.pad_id
    numbers, contexts = zip(*rows)
    questions = [self.questions[number] for number in numbers]
    context = [self._context(tuple(passages)) for passages in contexts]
    prefix_BQ, prefix_len_B = _pad(
      [question.prefix for question in questions], data.question_length, pad
    )
    output_BO, output_len_B = _pad(
      [question.output for question in questions], data.answer_length, pad
    )
    place_O = np.arange(data.answer_length)
    return {
      'prefix_BQ': prefix_BQ,
      'prefix_len_B': prefix_len_B,
      'chunks_BCK': np.stack([row[0] for row in context]),
      'chunk_len_BC': np.stack([row[1] for row in context]),
      'encoder_BCM': np.stack([row[2] for row in context]),
      'encoder_len_BC': np.stack([row[3] for row in context]),
      'encoder_cut_B': np.array([row[4].sum() for row in context], np.int32),
      'output_BO': output_BO,
      'output_len_B': output_len_B,
      'loss_mask_BO': (place_O >= self.answer_prompt)
      & (place_O < output_len_B[:, None]),
      'doc_B': np.array([q.document for q in questions], np.int32),
      'id_B': np.array(numbers, np.int32),
    }

  def _context(self, passages: tuple[int, ...]) -> list[np.ndarray]:
    """The chunk arrays of one row: its passages', then absent ones."""
    absent = [None] * (self.config.num_passages - len(passages))
    parts = [self._chunks(number) for number in (*passages, *absent)]
    return [np.concatenate(arrays) for arrays in zip(*parts)]

  @functools.cached_property
  def _chunks(self):
    """Passage number (None: no passage) -> its chunk arrays, remembered."""

    @functools.lru_cache(maxsize=1 << 16)
    def chunks(number):
      found = chunking.chunk_passage(
        '' if number is None else self.passage(number),
        self.tokenizer,
        self.encoder_tokenizer,
        self.chunk_size,
        self.config.max_encoder_tokens,
      )
      slots = self.config.passage_chunks
      return (
        _slots(found.chunks_CK, slots, self.tokenizer.pad_id),
        _slots(found.chunk_len_C, slots, 0),
        _slots(found.encoder_CM, slots, self.encoder_tokenizer.pad_id),
        _slots(found.encoder_len_C, slots, 0),
        _slots(found.truncated_C, slots, 0),
      )

    return chunks

  def passage(self, number: int) -> str:
    """A passage as the model is shown it."""
    title, text = self.passages[number]
    return fill(self.config.passage_template, title=title, text=text)

  @functools.cached_property
  def _index(self):
    return retrieval.index(
      [f'{title}\n{text}' for title, text in self.passages]
    )

  @functools.cached_property
  def _by_kind(self) -> dict[str, list[int]]:
    found = {}
    for number, question in enumerate(self.questions):
      found.setdefault(question.kind, []).append(number)
    return found

  @functools.cached_property
  def _evaluated(self) -> list[int]:
    known = 'gold' in self.kinds
    ranked = sorted(
      (
        number
        for number, question in enumerate(self.questions)
        if question.gold is not None or not known
      ),
      key=lambda number: _digest(self.questions[number].question),
    )
    turns = Counter()
    keyed = []
    for place, number in enumerate(ranked):
      kind = self.questions[number].kind
      keyed.append((turns[kind], place, number))
      turns[kind] += 1
    return [number for _, _, number in sorted(keyed)]


def build(config, tokenizer, encoder_tokenizer, split: str) -> Source:
  """Reads, checks and tokenises the questions of one split.

  Args:
    config: the `Config`; `config.data` names the questions and templates.
    tokenizer: the decoder's.
    encoder_tokenizer: the encoder's.
    split: 'train' or 'heldout'; records of one document are on the same side.

  Returns:
    The split's `Source`.

  Raises:
    UserError: the split has no usable question, or the file is bad.
  """
  data = config.data
  skipped = questions_lib.Skipped()
  records = list(questions_lib.read(config, skipped))
  heldout = _heldout({r.document for r in records}, data.heldout_fraction)
  prompt = tokenizer.encode(data.answer_template)[0]
  questions, passages, documents = [], {}, {}
  for record in records:
    if (record.document in heldout) != (split == 'heldout'):
      continue
    answer = tokenizer.encode(record.answers[0])[0]
    output = np.concatenate([prompt, answer, [tokenizer.eos_id]])
    if not len(answer) or len(output) > data.answer_length:
      skipped.add('answer longer than data.answer_length', record.line)
      continue
    prefix, cut = _prefix(record.question, data, tokenizer)
    if cut:
      skipped.add('question cut to data.question_length', record.line)
    given = [
      passages.setdefault(passage, len(passages)) for passage in record.passages
    ]
    questions.append(
      Question(
        question=record.question,
        answers=record.answers,
        kind=record.kind,
        document=documents.setdefault(record.document, len(documents)),
        prefix=prefix,
        output=output.astype(np.int32),
        given=tuple(dict.fromkeys(given)),
        gold=None if record.gold is None else given[record.gold],
      )
    )
  if not questions:
    reasons = '; '.join(skipped.lines()) or (
      'all are on the other side' if records else 'it is empty'
    )
    raise UserError(
      f'{data.questions}: no usable question for the {split} split ({reasons})'
    )
  unmarked = sum(question.gold is None for question in questions)
  if 0 < unmarked < len(questions):
    skipped.notes.append(
      f'{unmarked} x no passage marked gold, so trained on and not measured'
    )
  return Source(
    questions=tuple(questions),
    passages=tuple(passages),
    skipped=tuple(skipped.lines()),
    config=data,
    chunk_size=config.model.chunk_size,
    answer_prompt=len(prompt),
    tokenizer=tokenizer,
    encoder_tokenizer=encoder_tokenizer,
  )


def _prefix(question: str, data, tokenizer) -> tuple[np.ndarray, bool]:
  """BOS and the question; too long, its beginning goes (turns end it)."""
  ids = tokenizer.encode(fill(data.question_template, question=question))[0]
  room = data.question_length - 1
  cut = len(ids) > room
  if cut:
    head = data.question_template.partition('{question}')[0]
    head = tokenizer.encode(head)[0][: room - 1]
    ids = np.concatenate([head, ids[len(ids) - room + len(head) :]])
  return np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32), cut


def _heldout(documents: set[str], fraction: float) -> set[str]:
  """The held-out ones; of two or more, at least one and never all.

  By the rule of the corpus, so that the text of a held-out passage stands in
  no document that is trained on.
  """
  chosen = {text for text in documents if corpus.is_heldout(text, fraction)}
  if len(documents) > 1 and not chosen:
    chosen = {min(documents, key=_digest)}
  elif len(documents) > 1 and chosen == documents:
    chosen = documents - {max(documents, key=_digest)}
  return chosen


def _slots(array: np.ndarray, slots: int, fill: int) -> np.ndarray:
  """The first `slots` rows of an array, filled up with rows of `fill`."""
  array = array[:slots]
  missing = [(0, slots - len(array))] + [(0, 0)] * (array.ndim - 1)
  return np.pad(array, missing, constant_values=fill)


def _pad(
  rows: Sequence[np.ndarray], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  padded = np.full((len(rows), length), pad, np.int32)
  for row, ids in zip(padded, rows):
    row[: len(ids)] = ids
  return padded, np.array([len(ids) for ids in rows], np.int32)


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()
