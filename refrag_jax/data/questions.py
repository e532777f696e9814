"""Questions over passages, as they come: embedded, or a JSONL file of the user.

A record has the DPR form {"question", "answers", "ctxs": [{"title", "text"}]};
"turns", a list of {"speaker", "text"}, may stand for the question. A passage
that carries "gold": true (or DPR's "has_answer": true) holds the answer. What
cannot be used is skipped and counted, with the first line that had it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from refrag_jax.config import Config
from refrag_jax.data import stdlib
from refrag_jax.errors import UserError

TURN_TEMPLATE = '{speaker}: {text}'


class Record(NamedTuple):
  line: int
  question: str
  answers: tuple[str, ...]  # all right; the first is the reference
  passages: tuple[tuple[str, str], ...]  # (title, text), in the record's order
  gold: int | None  # the first gold one of `passages`
  kind: str  # what is asked, '' where the record does not say
  document: str  # whatever is equal is on the same side of the split


class Skipped:
  """Counts by reason, with the first line that gave it."""

  def __init__(self):
    self.count, self.first = Counter(), {}

  def add(self, reason: str, line: int) -> None:
    self.count[reason] += 1
    self.first.setdefault(reason, line)

  def lines(self) -> list[str]:
    return [
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


def check_there(config: Config) -> None:
  """Refuses a questions file that cannot be opened."""
  path = config.data.questions
  if path != 'stdlib':
    try:
      with open(path, 'rb'):
        pass
    except OSError as error:
      raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> UserError:
  return UserError(
    f'data.questions: {path} cannot be read ({error.strerror}); give'
    " 'stdlib' or a JSONL file"
  )


def read(config: Config, skipped: Skipped) -> Iterator[Record]:
  """Yields the usable records of `config.data.questions`, counts the others."""
  for line, value in _values(config, skipped):
    record = _record(value, line, skipped)
    if record is not None:
      yield record


def _values(config: Config, skipped: Skipped) -> Iterator[tuple[int, Any]]:
  path = config.data.questions
  if path == 'stdlib':
    # A token is at least a byte: no tokenizer will have to cut a passage. (In
    # caps too small to ask anything, the chunk cap cuts them after all.)
    room = config.data.passage_chunks * config.model.chunk_size
    template = fill(config.data.passage_template, title='', text='')
    room = max(room - len(template.encode()), stdlib.FEWEST_BYTES)
    yield from enumerate(stdlib.questions(room), 1)
    return
  try:
    with open(path, 'rb') as file:
      for line, data in enumerate(file, 1):
        if not data.strip():
          continue
        try:
          value = json.loads(data)
          # JSON can spell a lone surrogate, which has no UTF-8.
          json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
          skipped.add('not JSON in UTF-8', line)
        else:
          yield line, value
  except OSError as error:
    raise _unreadable(path, error) from None


def _record(value: Any, line: int, skipped: Skipped) -> Record | None:
  if not isinstance(value, dict):
    skipped.add('not an object', line)
    return None
  question = value.get('question', _conversation(value.get('turns')))
  if not isinstance(question, str) or not question.strip():
    skipped.add("no 'question'", line)
    return None
  answers = value.get('answers')
  if not _is_list(answers, str) or not answers or not all(answers):
    skipped.add("no 'answers' (a list of texts)", line)
    return None
  if not _is_list(value.get('ctxs'), dict):
    skipped.add("no 'ctxs' (a list of passages)", line)
    return None
  passages, gold = [], None
  for ctx in value['ctxs']:
    text = ctx.get('text')
    if not isinstance(text, str) or not text.strip():
      skipped.add('empty passage', line)
      continue
    if gold is None and ctx.get('gold', ctx.get('has_answer')):
      gold = len(passages)
    passages.append((str(ctx.get('title') or ''), text))
  if not passages:
    skipped.add('no passage with text', line)
    return None
  about = question if gold is None else passages[gold][1]
  return Record(
    line=line,
    question=question,
    answers=tuple(answers),
    passages=tuple(passages),
    gold=gold,
    kind=str(value.get('kind', '')),
    document=str(value.get('document', about)),
  )


def _conversation(turns: Any) -> str:
  """The turns, one a line; '' if there are none."""
  if not _is_list(turns, dict):
    return ''
  said = [(turn.get('speaker'), turn.get('text')) for turn in turns]
  if not all(_is_list(list(pair), str) for pair in said):
    return ''
  return '\n'.join(fill(TURN_TEMPLATE, speaker=s, text=t) for s, t in said)


def _is_list(value: Any, of: type) -> bool:
  return isinstance(value, list) and all(isinstance(item, of) for item in value)
