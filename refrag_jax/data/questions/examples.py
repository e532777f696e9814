"""Questions over passages as refrag batches, in a prompt template.

Records (records.py) become what the decoder is given, with the templates of
the config:

  prefix    BOS, question_template
  context   passage_template of each passage, chunked on its own
  output    answer_template (given, no loss), the answer and EOS (loss)

Either template may hold the question. With `chat` all of it is what the user
says in the model's own chat template, and the answer what the assistant says.
Passage p owns the chunks from p * passage_chunks to (p + 1) * passage_chunks;
what it does not fill has length 0. No chunk ever straddles two passages. With
`history_chunks` a conversation but for its last turn is compressed as well, its
end in so many chunks before those of the passages.

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

from refrag_jax.data import batch as batch_lib
from refrag_jax.data import chunking
from refrag_jax.data.questions import prompts, retrieval
from refrag_jax.data.questions import records as questions_lib
from refrag_jax.data.questions.records import fill
from refrag_jax.data.text import corpus
from refrag_jax.errors import UserError

# Which passages a question is shown with.
#   none              no passage
#   given             the record's own, in the record's order
#   gold              the gold passage alone
#   gold_distractors  the gold passage and others of the record, in random order
#   gold_missing      the others alone: what a weak retriever brings
#   bm25              the best of all passages by BM25, best first
#   shuffled          another question's gold_distractors (given, without gold)
KINDS = (
  'none',
  'given',
  'gold',
  'gold_distractors',
  'gold_missing',
  'bm25',
  'shuffled',
)

# Shares of these in training where the gold passage is known; where it is not,
# all of it is `given`. Mostly the setting that is asked for in the end: several
# passages, one of which matters, at any place. BM25's mistakes are the rest,
# and single passages keep the answer from being always a matter of choosing.
TRAINING_MIX = {'gold_distractors': 0.7, 'bm25': 0.2, 'gold': 0.1}

COUNTED = 4096  # passages that are looked at to say how many are cut


@dataclasses.dataclass(frozen=True)
class Question:
  """A record, tokenised but for its passages."""

  question: str
  answers: tuple[str, ...]  # all right; the first is the reference
  kind: str  # what is asked, '' where the record does not say
  document: int  # the unit of standard errors
  prefix: np.ndarray  # int32[<= Q]
  prompt: np.ndarray  # int32, of the output what is given
  answer: np.ndarray  # int32, of the output what is to be predicted
  given: tuple[int, ...]  # numbers of passages, the record's order
  gold: tuple[int, ...]  # those that the answer needs; (): not known
  right: tuple[int, ...]  # all that are marked: no distractors
  source: int  # of the files
  choices: tuple[str, ...]  # what the answer is one of; (): it is free
  history: str  # what is compressed of a conversation
  whole: bool  # the passages are one text, to be read in order


@dataclasses.dataclass(frozen=True)
class Source:
  """One split's questions, and the batches made of them."""

  questions: tuple[Question, ...]
  passages: tuple[tuple[str, str], ...]  # (title, text)
  skipped: tuple[str, ...]  # what was left out or cut, and why, with counts
  config: Any  # DataConfig
  weights: tuple[float, ...]  # of the files, in training
  chunk_size: int
  prompt_slots: int  # the most tokens that are given before an answer
  tokenizer: Any
  encoder_tokenizer: Any

  @property
  def kinds(self) -> tuple[str, ...]:
    """The `KINDS` that these records allow."""
    known = any(question.gold for question in self.questions)
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

  def options(
    self, batch: dict[str, np.ndarray]
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Multiple choice: a batch's questions with each of their options.

    Returns:
      row_X, of which row of the batch each option is; and the rows, whose
      outputs are the options in the order of `Question.choices`, each with EOS.
    """
    row_X, rows = [], []
    for row, number in enumerate(batch['id_B']):
      question = self.questions[number]
      for choice in question.choices:
        row_X.append(row)
        rows.append((question.prompt, self._answer(choice)))
    row_X = np.array(row_X)
    return row_X, batch_lib.take(batch, row_X) | self._outputs(rows)

  def _answer(self, text: str) -> np.ndarray:
    ids = self.tokenizer.encode(text)[0]
    return np.concatenate([ids, [self.tokenizer.eos_id]]).astype(np.int32)

  def _draw(self, seed, step, row) -> tuple[int, list[int]]:
    rng = np.random.default_rng((seed, step, row))
    pools = self._by_kind[0]
    if len(self._by_kind) > 1:
      shares = np.array(self.weights) / sum(self.weights)
      pools = self._by_kind[rng.choice(len(shares), p=shares)]
    # What is asked is drawn first, so that no kind of question drowns another.
    asked = sorted(pools)
    pool = pools[asked[rng.integers(len(asked))]]
    number = pool[rng.integers(len(pool))]
    kind = 'given'
    if self.questions[number].gold:
      kind = rng.choice(list(TRAINING_MIX), p=list(TRAINING_MIX.values()))
    return number, self._choose(number, kind, rng)

  def _choose(self, number, kind, rng) -> list[int]:
    """Numbers of the passages that question `number` is shown with."""
    question, most = self.questions[number], self.config.num_passages
    if kind == 'none':
      return []
    if kind == 'given':
      return list(question.given[:most])
    # One text in order: there is nothing to find, and nothing to put between.
    alone = question.whole and kind not in ('shuffled', 'gold_missing')
    if kind == 'gold' or alone:
      return list(question.gold[:most])
    if kind == 'bm25':
      return retrieval.top_k(self._index, question.question, most).tolist()
    if kind == 'shuffled':
      # Of another document, where there is one: neighbours share passages.
      for _ in range(100):
        other = self._evaluated[rng.integers(len(self._evaluated))]
        if self.questions[other].document != question.document:
          break
      known = bool(self.questions[other].gold)
      return self._choose(other, 'gold_distractors' if known else 'given', rng)
    gold = () if kind == 'gold_missing' else question.gold[:most]
    distractors = [p for p in question.given if p not in question.right]
    if not distractors:  # it brings none
      distractors = self._like(question, most)
    chosen = rng.permutation(distractors)[: most - len(gold)]
    chosen = chosen.astype(int).tolist()
    if len(gold) == 1:
      places = [rng.integers(len(chosen) + 1)]
    else:  # any places alike, in the order of the record
      every = len(chosen) + len(gold)
      places = sorted(rng.choice(every, len(gold), replace=False).tolist())
    for place, number in zip(places, gold, strict=True):
      chosen.insert(place, number)
    return chosen

  def _like(self, question: Question, most: int) -> list[int]:
    """The best passages by BM25 that are not marked and hold no right answer.

    As words; where there are other letters than ASCII's, anywhere: scripts
    without blanks have no words for BM25.
    """
    # An option's letter stands in every text.
    answers = [] if question.choices else question.answers
    spelt = lambda text: f' {" ".join(retrieval.words(text))} '
    holds = lambda text, answer: (
      spelt(answer) in spelt(text)
      or (not answer.isascii() and answer.lower() in text.lower())
    )
    near = retrieval.top_k(
      self._index, question.question, 2 * most + len(question.gold)
    ).tolist()
    wrong = [
      p
      for p in near
      if p not in question.right
      and not any(holds(self.passage(p), answer) for answer in answers)
    ]
    return wrong[:most]

  def _stack(self, rows) -> dict[str, np.ndarray]:
    data, pad = self.config, self.tokenizer.pad_id
    numbers, contexts = zip(*rows)
    questions = [self.questions[number] for number in numbers]
    context = [
      self._context(question.history, tuple(passages))
      for question, passages in zip(questions, contexts, strict=True)
    ]
    prefix_BQ, prefix_len_B = _pad(
      [question.prefix for question in questions], data.question_length, pad
    )
    return self._outputs([(q.prompt, q.answer) for q in questions]) | {
      'prefix_BQ': prefix_BQ,
      'prefix_len_B': prefix_len_B,
      'chunks_BCK': np.stack([row[0] for row in context]),
      'chunk_len_BC': np.stack([row[1] for row in context]),
      'encoder_BCM': np.stack([row[2] for row in context]),
      'encoder_len_BC': np.stack([row[3] for row in context]),
      'encoder_cut_B': np.array([row[4].sum() for row in context], np.int32),
      'doc_B': np.array([q.document for q in questions], np.int32),
      'id_B': np.array(numbers, np.int32),
    }

  def _outputs(
    self, rows: Sequence[tuple[np.ndarray, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    """The fields of outputs, each given first and to be predicted then."""
    slots = questions_lib.output_slots(self.config)
    output_BO, output_len_B = _pad(
      [np.concatenate(row) for row in rows], slots, self.tokenizer.pad_id
    )
    given_B = np.array([len(prompt) for prompt, _ in rows])
    place_O = np.arange(slots)
    return {
      'output_BO': output_BO,
      'output_len_B': output_len_B,
      'loss_mask_BO': (place_O >= given_B[:, None])
      & (place_O < output_len_B[:, None]),
    }

  def _context(
    self, history: str, passages: tuple[int, ...]
  ) -> list[np.ndarray]:
    """The chunk arrays of one row: its passages', then absent ones."""
    absent = [None] * (self.config.num_passages - len(passages))
    parts = [self._chunks(number) for number in (*passages, *absent)]
    if self.config.history_chunks:
      # The end of what was said is what the question goes on from.
      parts.insert(0, self._cut(history, self.config.history_chunks, last=True))
    return [np.concatenate(arrays) for arrays in zip(*parts)]

  @functools.cached_property
  def _chunks(self):
    """Passage number (None: no passage) -> its chunk arrays, remembered."""
    return functools.lru_cache(maxsize=1 << 16)(
      lambda number: self._cut(
        '' if number is None else self.passage(number),
        self.config.passage_chunks,
      )
    )

  def _cut(self, text: str, slots: int, last: bool = False):
    """A text's chunk arrays; the first chunks, or the last, if too long."""
    found = chunking.chunk_passage(
      text,
      self.tokenizer,
      self.encoder_tokenizer,
      self.chunk_size,
      self.config.max_encoder_tokens,
    )
    kept = slice(-slots, None) if last else slice(slots)
    return (
      _slots(found.chunks_CK[kept], slots, self.tokenizer.pad_id),
      _slots(found.chunk_len_C[kept], slots, 0),
      _slots(found.encoder_CM[kept], slots, self.encoder_tokenizer.pad_id),
      _slots(found.encoder_len_C[kept], slots, 0),
      _slots(found.truncated_C[kept], slots, 0),
    )

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
  def _by_kind(self) -> list[dict[str, list[int]]]:
    """Of each file: what is asked -> numbers of questions."""
    found = [{} for _ in self.weights]
    for number, question in enumerate(self.questions):
      found[question.source].setdefault(question.kind, []).append(number)
    return found

  @functools.cached_property
  def _evaluated(self) -> list[int]:
    known = 'gold' in self.kinds
    ranked = sorted(
      (
        number
        for number, question in enumerate(self.questions)
        if question.gold or not known
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


def build(
  config, tokenizer, encoder_tokenizer, split: str, files: Sequence[str] = ()
) -> Source:
  """Reads, checks and tokenises the questions of one split.

  Args:
    config: the `Config`; `config.data` names the questions and templates.
    tokenizer: the decoder's.
    encoder_tokenizer: the encoder's.
    split: 'train' or 'heldout'; records of one document are on the same side.
      'all': whatever side they are on; of other files than the config's, what
      is asked in training as well is left out.
    files: other ones than `config.data.questions`.

  Returns:
    The split's `Source`.

  Raises:
    UserError: a file has no usable question on that side, or is bad.
  """
  data = config.data
  files = tuple(files) or data.questions
  weights = data.question_weights if files == data.questions else ()
  templates = prompts.templates(data, tokenizer)
  # What two files have in common is on one side as well.
  together = files if split == 'all' else (*data.questions, *files)
  skipped = {path: questions_lib.Skipped() for path in dict.fromkeys(together)}
  records = {
    path: questions_lib.read(config, path, skipped[path]) for path in skipped
  }
  records = _joined(records)
  # The embedded ones are taken by the module that they ask about, so that their
  # text is on its side.
  heldout = _heldout(
    {r.document for of in records.values() for r in of}, data.heldout_fraction
  )
  others = set(files).difference(data.questions) if split == 'all' else ()
  known = _trained_on(config) if others else frozenset()
  questions, passages, documents, lines = [], {}, {}, []
  for place, path in enumerate(files):
    found = _questions(
      [
        r
        for r in records[path]
        if split == 'all' or (r.document in heldout) == (split == 'heldout')
      ],
      data, config.model.chunk_size, tokenizer, templates, passages, documents,
      place, skipped[path], known if path in others else frozenset(),
    )  # fmt: skip
    unmarked = sum(not question.gold for question in found)
    if 0 < unmarked < len(found):
      skipped[path].notes.append(
        f'{unmarked} x no passage marked gold, so trained on and not measured'
      )
    if not found:
      reasons = '; '.join(skipped[path].lines()) or (
        'all are on the other side' if records[path] else 'it is empty'
      )
      raise UserError(
        f'{path}: no usable question for the {split} split ({reasons})'
      )
    questions += found
    where = f'{path}: ' if len(files) > 1 else ''
    lines += [where + line for line in skipped[path].lines()]
  long = _long(list(passages), data, config.model.chunk_size, tokenizer)
  return Source(
    questions=tuple(questions),
    passages=tuple(passages),
    skipped=(*lines, *long),
    config=data,
    weights=tuple(weights) or (1.0,) * len(files),
    chunk_size=config.model.chunk_size,
    prompt_slots=questions_lib.output_slots(data) - templates.answer_room,
    tokenizer=tokenizer,
    encoder_tokenizer=encoder_tokenizer,
  )


def _trained_on(config) -> frozenset[str]:
  """What the training side of config.data.questions asks, with its answers."""
  paths = dict.fromkeys(config.data.questions)
  records = _joined(
    {p: questions_lib.read(config, p, questions_lib.Skipped()) for p in paths}
  )
  records = [r for of in records.values() for r in of]
  heldout = _heldout(
    {r.document for r in records}, config.data.heldout_fraction
  )
  return frozenset(
    asked
    for r in records
    if r.document not in heldout
    for asked in questions_lib.with_answers(r)
  )


def _joined(
  records: dict[str, list[questions_lib.Record]],
) -> dict[str, list[questions_lib.Record]]:
  """The records of several files, those that belong together of one document.

  But for the embedded ones, whose documents are texts of `stdlib`.
  """
  free = [path for path in records if path != questions_lib.STDLIB]
  joined = iter(
    questions_lib.joined([r for path in free for r in records[path]])
  )
  return records | {
    path: [next(joined) for _ in records[path]] for path in free
  }


def _questions(
  records, data, chunk_size, tokenizer, templates, passages, documents, source,
  skipped, known,
) -> list[Question]:  # fmt: skip
  """The records of one file and side as questions.

  Args:
    passages, documents: text and name -> number, of all files; they grow.
    known: what is asked in training, with its answers, and left out here.
  """
  found = []
  for record in records:
    if known.intersection(questions_lib.with_answers(record)):
      skipped.add('asked in training as well', record.line)
      continue
    answer = tokenizer.encode(record.answers[0])[0]
    longest = len(answer)
    if record.choices:
      longest = max(map(len, tokenizer.ids_batch(record.choices)))
    if not len(answer) or longest + 1 > templates.answer_room:
      skipped.add('answer longer than data.answer_length', record.line)
      continue
    compressed = data.history_chunks and record.history
    asked = record.last_turn if compressed else record.question
    around = prompts.around(
      asked, data, templates, tokenizer, data.question_length
    )
    if around.cut and record.choices:  # its beginning is the question
      skipped.add('options longer than data.question_length', record.line)
      continue
    if around.cut:
      skipped.add('question cut to data.question_length', record.line)
    own = record.passages
    gold = record.gold
    if record.whole:
      own = _pages(own[0], data, chunk_size, tokenizer)
      gold = range(len(own))
      if len(own) > data.num_passages:
        skipped.add('text cut to data.num_passages', record.line)
    elif len(gold) > data.num_passages:
      skipped.add('gold passages cut to data.num_passages', record.line)
    given = [passages.setdefault(p, len(passages)) for p in own]
    found.append(
      Question(
        question=record.question,
        answers=record.answers,
        kind=record.kind,
        document=documents.setdefault(record.document, len(documents)),
        prefix=around.prefix,
        prompt=around.given,
        answer=np.append(answer, tokenizer.eos_id).astype(np.int32),
        given=tuple(dict.fromkeys(given)),
        gold=tuple(dict.fromkeys(given[g] for g in gold)),
        right=tuple(given[g] for g in (gold if record.whole else record.right)),
        source=source,
        choices=record.choices,
        history=record.history if compressed else '',
        whole=record.whole,
      )
    )
  return found


def _pages(
  passage: tuple[str, str], data, chunk_size: int, tokenizer
) -> list[tuple[str, str]]:
  """A text in passages that each fill their chunks."""
  title, text = passage
  around = fill(data.passage_template, title=title, text='')
  room = data.passage_chunks * chunk_size - len(tokenizer.encode(around)[0])
  if title and room < data.passage_chunks * chunk_size // 2:  # its title alone
    return _pages(('', text), data, chunk_size, tokenizer)
  starts_T = tokenizer.encode(text)[1]
  # A token may become two where the text is cut.
  cuts = starts_T[:: max(1, room - 2)].tolist()
  pages = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
  return [(title, page) for page in pages if page.strip()]


def _long(passages, data, chunk_size: int, tokenizer) -> list[str]:
  """Says how many passages are cut, as the first of them tell."""
  first = passages[:COUNTED]
  texts = [fill(data.passage_template, title=a, text=b) for a, b in first]
  room = data.passage_chunks * chunk_size
  cut = sum(len(ids) > room for ids in tokenizer.ids_batch(texts))
  of = f'the first {len(first)}' if len(first) < len(passages) else len(first)
  return [f'{cut} of {of} passages cut to data.passage_chunks'] if cut else []


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
