"""Questions over passages, as they come: embedded, or a JSONL file of the user.

A record has the DPR form {"question", "answers", "ctxs": [{"title", "text"}]};
"turns", a list of {"speaker", "text"} (or "role" and "content"), may stand for
the question. A passage that carries "gold": true (or "has_answer" or
"hasanswer", as DPR and Contriever write it) holds the answer. A field that is
null is one that is not there. Other published forms are made into this one
(forms.py). The file has a record a line, or is one JSON array; it may be packed
(.gz, .zst). What cannot be used is skipped and counted, with the first line
that had it.
"""

import hashlib
import json
import platform
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from refrag_jax.config.schema import Config, DataConfig
from refrag_jax.data.questions import forms
from refrag_jax.data.text import sources as text_lib
from refrag_jax.data.text import stdlib
from refrag_jax.errors import UserError
from refrag_jax.runtime.paths import refuse_pointer

# Whether a passage holds the answer; the first that is there counts.
FLAGS = ('gold', 'has_answer', 'hasanswer')
# What else may be meant to be one.
LIKE_FLAGS = re.compile('gold|answer|positive|relevan|support')
TURN_TEMPLATE = '{speaker}: {text}'
# A question that more records have, and more than this share of them, is one
# that many ask.
FEW, MANY = 5, 0.05
STDLIB = 'stdlib'  # in a file's place: the embedded questions


class Record(NamedTuple):
  line: int
  question: str
  answers: tuple[str, ...]  # all right; the first is the reference
  passages: tuple[tuple[str, str], ...]  # (title, text), in the record's order
  gold: tuple[int, ...]  # those of `passages` that the answer needs
  right: tuple[int, ...]  # all that are marked: no distractors
  kind: str  # what is asked, '' where the record does not say
  document: str  # whatever is equal is on the same side of the split
  choices: tuple[str, ...]  # what the answer is one of; (): it is free
  history: str  # of a conversation, what came before its last turn
  last_turn: str  # and that; '' where the question is no conversation
  whole: bool  # the passages are one text, to be read in order


class Skipped:
  """Counts by reason, with the first line that gave it."""

  def __init__(self):
    self.count, self.first = Counter(), {}
    self.notes = []  # what else is to be said

  def add(self, reason: str, line: int) -> None:
    self.count[reason] += 1
    self.first.setdefault(reason, line)

  def lines(self) -> list[str]:
    return self.notes + [
      f'{n} x {reason} (first in line {self.first[reason]})'
      for reason, n in self.count.items()
    ]


def fill(template: str, **values: str) -> str:
  """Fills all fields at once: braces in a passage are text like any other.

  >>> fill('{title}: {text}', title='{text}', text='{}')
  '{text}: {}'
  """
  fields = '|'.join(values)
  return re.sub(rf'{{({fields})}}', lambda match: values[match[1]], template)


def output_slots(data: DataConfig) -> int:
  """O: the answer, what is given before it, and the question if it is."""
  asks = '{question}' in data.answer_template
  return data.answer_length + asks * data.question_length


def check_there(paths: Iterable[str]) -> None:
  """Refuses question files that cannot be opened."""
  for path in paths:
    if path != STDLIB:
      try:
        refuse_pointer(path)
      except OSError as error:
        raise UserError(
          f'questions {path} cannot be read ({error.strerror}); give'
          f" '{STDLIB}' or a JSONL file"
        ) from None


def fingerprint(paths: Iterable[str]) -> str:
  """Changes with what the questions say, wherever they lie."""
  paths = tuple(paths)
  check_there(paths)
  digests = []
  for path in paths:
    if path == STDLIB:
      digests.append(f'stdlib of Python {platform.python_version()}')
    else:
      with open(path, 'rb') as f:
        digests.append(hashlib.file_digest(f, 'sha256').hexdigest())
  return ' '.join(digests)


def read(config: Config, path: str, skipped: Skipped) -> list[Record]:
  """The usable records of one questions file; counts the others.

  Raises:
    UserError: the file cannot be read, or marks gold passages in a way that
      could mean either.
  """
  records, likely, flagged = [], Counter(), False
  for line, value in _in_one_form(_values(config, path, skipped), skipped):
    record = _record(value, path, line, skipped)
    if record is not None:
      records.append(record)
      flagged |= bool(record.gold)
      for ctx in value['ctxs']:
        likely.update(
          key
          for key in ctx
          if key not in FLAGS and LIKE_FLAGS.search(key.lower())
        )
  if likely and not flagged:
    skipped.notes.append(
      f'no passage is marked gold; {", ".join(sorted(likely))} is not read: '
      f'call it {FLAGS[0]}'
    )
  return records


def _in_one_form(
  values: Iterable[tuple[int, Any]], skipped: Skipped
) -> Iterator[tuple[int, Any]]:
  """The records in the DPR form; counts what is not in the file's own form."""
  name, ids = '', set()
  for line, value in values:
    if not isinstance(value, dict):
      skipped.add('not an object', line)
      continue
    form = forms.form_of(value)
    if name and form.name not in (name, 'header'):
      skipped.add(f'a record of the form {form.name} among {name}', line)
      continue
    try:
      found = [_without_nulls(record) for record in form.read(value)]
    except forms.Unusable as e:
      skipped.add(str(e), line)
      continue
    # Whatever a field holds instead of what it should.
    except (TypeError, ValueError, LookupError, AttributeError):
      skipped.add(f'not in the form {form.name}', line)
      continue
    if any('ctxs' in record for record in found):
      name = form.name
    for record in found:
      own = record.get('id')
      known = isinstance(own, str | int) and own != ''
      if known and own in ids:
        skipped.add('id that another record has', line)
        continue
      ids |= {own} if known else set()
      yield line, record


def _without_nulls(value: Any) -> Any:
  """The value without fields that are null, at any depth."""
  if isinstance(value, dict):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


def joined(records: list[Record]) -> list[Record]:
  """The records, those with a question or gold text in common of one document.

  Else the same question would be trained on and held out. A question that many
  ask, such as "Summarise this.", tells nothing about any one: it counts with
  its answers, and not even with them where many have those as well.
  """
  asked = Counter(_normal(record.question) for record in records)
  with_answer = Counter(
    pair for record in records for pair in with_answers(record)
  )
  many = max(FEW, len(records) * MANY)

  def keys(record: Record) -> list[str]:
    question = _normal(record.question)
    if asked[question] <= many:
      return [question]
    pairs = with_answers(record)
    return [pair for pair in pairs if with_answer[pair] <= many]

  found = _components(records, keys)
  if len(records) > 1 and len({record.document for record in found}) == 1:
    found = _components(records, with_answers)
  return found


def with_answers(record: Record) -> list[str]:
  """The question with each of its answers, spelt alike where they are alike."""
  question = _normal(record.question)
  return list(
    dict.fromkeys(f'{question}\n{_normal(a)}' for a in record.answers)
  )


def _components(
  records: list[Record], asked: Callable[[Record], list[str]]
) -> list[Record]:
  """The records, those with what is `asked` or a gold text in common joined.

  A document's name is the least of those that came together, so that it stays
  what it was where nothing is shared.
  """
  parent: dict[str, str] = {}

  def root(name: str) -> str:
    while parent.setdefault(name, name) != name:
      parent[name] = name = parent[parent[name]]
    return name

  first: dict[tuple[str, str], str] = {}
  for record in records:
    shared = [('question', key) for key in asked(record)]
    shared += [('gold', _normal(record.passages[g][1])) for g in record.gold]
    for key in shared:
      a, b = root(first.setdefault(key, record.document)), root(record.document)
      parent[max(a, b)] = min(a, b)
  return [record._replace(document=root(record.document)) for record in records]


def _normal(text: str) -> str:
  """A text without what two copies of it may differ in."""
  kept = text.lower().translate(str.maketrans('', '', string.punctuation))
  # A question of signs alone is what it is.
  return ' '.join(kept.split()) or text


def _values(
  config: Config, path: str, skipped: Skipped
) -> Iterator[tuple[int, Any]]:
  if path == STDLIB:
    # A token is at least a byte: no tokenizer will have to cut a passage. (In
    # caps too small to ask anything, the chunk cap cuts them after all.)
    room = config.data.passage_chunks * config.model.chunk_size
    template = fill(config.data.passage_template, title='', text='')
    room = max(room - len(template.encode()), stdlib.FEWEST_BYTES)
    yield from enumerate(stdlib.questions(room), 1)
    return
  check_there([path])
  for line, value in text_lib.json_values(path):
    try:
      # It can spell a lone surrogate, which has no UTF-8.
      if value is not text_lib.INVALID:
        json.dumps(value, ensure_ascii=False).encode()
        value = _without_nulls(value)
        yield line, value
        continue
    except (ValueError, RecursionError):
      pass
    skipped.add('not JSON in UTF-8', line)


def _record(
  value: dict[str, Any], path: str, line: int, skipped: Skipped
) -> Record | None:
  turns = () if 'question' in value else _conversation(value.get('turns'))
  question = value.get('question', '\n'.join(turns))
  if not isinstance(question, str) or not question.strip():
    skipped.add(f"no 'question'{_has(value, 'question')}", line)
    return None
  answers = value.get('answers')
  if not _is_list(answers, str) or not answers or not all(answers):
    what = "no 'answers' (a list of texts)"
    skipped.add(what + _has(value, 'answers'), line)
    return None
  choices = value.get('choices', [])
  if choices and not (
    _is_list(choices, str)
    and len(set(choices)) == len(choices) > 1
    and set(answers) <= set(choices)
  ):
    skipped.add("'choices' that are not texts with the answer among them", line)
    return None
  if not _is_list(value.get('ctxs'), dict):
    what = "no 'ctxs' (a list of passages)"
    skipped.add(what + _has(value, 'ctxs'), line)
    return None
  passages, right = [], []
  for ctx in value['ctxs']:
    text = ctx.get('text')
    if not isinstance(text, str) or not text.strip():
      skipped.add('empty passage', line)
      continue
    if _flag(ctx, path, line):
      right.append(len(passages))
    passages.append((str(ctx.get('title') or ''), text))
  gold = right if value.get('all_gold') else right[:1]
  if not passages:
    skipped.add('no passage with text', line)
    return None
  about = passages[gold[0]][1] if gold else question
  return Record(
    line=line,
    question=question,
    answers=tuple(answers),
    passages=tuple(passages),
    gold=tuple(gold),
    right=tuple(right),
    kind=str(value.get('kind', '')),
    document=str(value.get('document', about)),
    choices=tuple(choices),
    history='\n'.join(turns[:-1]),
    last_turn=turns[-1] if turns else '',
    whole=bool(value.get('whole')),
  )


def _has(record: dict[str, Any], field: str) -> str:
  """What there is instead of a field that is not there."""
  if field in record or not record:
    return ''
  return f'; it has {", ".join(list(record)[:6])}'


def _flag(ctx: dict[str, Any], path: str, line: int) -> bool:
  """Whether a passage is marked as gold.

  Raises:
    UserError: the mark is neither a boolean nor 0 or 1.
  """
  marks = {key: ctx[key] for key in FLAGS if ctx.get(key) is not None}
  for key, value in marks.items():
    if not isinstance(value, bool | int | float) or value not in (0, 1):
      raise UserError(
        f'{path}, record {line}: {key} is {value!r:.60}: write true or '
        'false (or 1 or 0)'
      )
  return bool(next(iter(marks.values()), False))


def _conversation(turns: Any) -> tuple[str, ...]:
  """The turns as they are shown, each a line; () if there are none."""
  if not _is_list(turns, dict):
    return ()
  first = lambda turn, *names: next((turn[n] for n in names if n in turn), None)
  said = [
    (first(turn, 'speaker', 'role'), first(turn, 'text', 'content'))
    for turn in turns
  ]
  if not all(_is_list(list(pair), str) for pair in said):
    return ()
  return tuple(fill(TURN_TEMPLATE, speaker=s, text=t) for s, t in said)


def _is_list(value: Any, of: type) -> bool:
  return isinstance(value, list) and all(isinstance(item, of) for item in value)
