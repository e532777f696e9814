"""The embedded default: the running interpreter's own documentation.

Text: `pydoc_data.topics` (the language reference as plain text) and the
docstrings of the standard library, joined per module, about 2 MB of English
that every Python brings along, in an order that is the same everywhere.

Long texts are cut into several documents, because documents are the unit of the
train/held-out split and of every standard error.

Questions: a passage is a function's qualified name, signature and the start of
its docstring. Three kinds are asked: a parameter's default, the n-th parameter,
and which function a sentence describes. "What does X do?" would be no test:
half of the docstrings *are* their first sentence. A question and its
distractors stay within one document, so that nothing a held-out question needs
was ever trained on.
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator

from refrag_jax.data.text import docstrings

# A document ends before the entry or paragraph that would make it longer.
DOCUMENT_BYTES = 2_000

QUESTION_BYTES = 80
ANSWER_BYTES = 24
PASSAGES = 16  # at most, a question; the gold one included
FEWEST_PASSAGES = 4  # a document with fewer asks nothing
FEWEST_BYTES = 64  # of a passage: shorter ones hold hardly a signature
# More than half of all defaults are None, which would be a good blind guess: no
# answer may be right more often than this.
DEFAULT_REPEATS = 60
ORDINALS = ('1st', '2nd', '3rd', '4th')


def documents() -> Iterator[tuple[str, str]]:
  """Yields every document as (name, text), always in the same order."""
  for name, text, _ in _documents():
    yield name, text


def questions(passage_bytes: int = 126) -> list[dict]:
  """The questions about `documents`, in the DPR form.

  Args:
    passage_bytes: the most that a passage's title and text have together.

  Returns:
    Dicts of `question`, `answers` (all are right, the first is the reference),
    `ctxs` (dicts of `title` and `text`; the gold passage first and marked
    `gold`, then the distractors), `kind` ('default', 'parameter' or
    'describes') and `document` (the text that decides the side of the split).
  """
  described = _described_once()
  asked = []
  for _, text, entries in _documents():
    passages = {
      entry: passage
      for entry in entries
      if (passage := _passage(entry, passage_bytes))
    }
    if len(passages) < FEWEST_PASSAGES:
      continue
    for entry, passage in passages.items():
      others = [other for other in passages.values() if other is not passage]
      for kind, question, answers in _ask(entry, passage, others, described):
        if len(question.encode()) > QUESTION_BYTES:
          continue
        if len(answers[0].encode()) > ANSWER_BYTES:
          continue
        random.Random(question).shuffle(others)
        asked.append(
          {
            'question': question,
            'answers': answers,
            'ctxs': [{**passage, 'gold': True}, *others[: PASSAGES - 1]],
            'kind': kind,
            'document': text,
          }
        )
  return _limit_defaults(asked)


def _passage(entry: docstrings.Entry, limit: int) -> dict | None:
  """Title and text, cut after a word; None where no sense would be left."""
  if not entry.qualname:
    return None
  paragraph = ' '.join(entry.doc.split('\n\n')[0].split())
  room = limit - len(f'{entry.module}{entry.signature}\n'.encode())
  if len(paragraph.encode()) > room:
    if room < 16:
      return None
    paragraph = paragraph.encode()[: room + 1].decode(errors='ignore')
    paragraph = paragraph.rpartition(' ')[0]
  if not paragraph:
    return None
  return {'title': entry.module, 'text': f'{entry.signature}\n{paragraph}'}


def _ask(entry: docstrings.Entry, passage, others, described: frozenset[str]):
  """Yields (kind, question, answers) of one passage."""
  name = f'{entry.module}.{entry.qualname}'
  plain = [shown.partition('=')[0] for shown, _ in entry.parameters or ()]
  for parameter, (_, default) in zip(plain, entry.parameters or ()):
    if default and _survives_normalisation(default):
      question = f'What is the default of {parameter} in {name}?'
      yield 'default', question, [default]
  for ordinal, parameter in zip(ORDINALS, plain[: entry.positional]):
    if _survives_normalisation(parameter):
      question = f'What is the {ordinal} parameter of {name}?'
      yield 'parameter', question, [parameter]
  sentence = _sentence(entry)
  elsewhere = any(sentence in other['text'] for other in others)
  if sentence in described and sentence in passage['text'] and not elsewhere:
    last = entry.qualname.rpartition('.')[2]
    answers = list(dict.fromkeys((entry.qualname, last, name)))
    yield 'describes', f'Which function does this? {sentence}', answers


def _survives_normalisation(answer: str) -> bool:
  """Exact match ignores punctuation and articles: '' or -1 cannot be asked."""
  text = re.sub(r'[^a-z0-9]', '', answer.lower())
  return text not in ('', 'a', 'an', 'the') and answer[0] != '-'


def _sentence(entry: docstrings.Entry) -> str:
  """The first sentence of a function's docstring; '' if it tells the name."""
  paragraph = ' '.join(entry.doc.split('\n\n')[0].split())
  sentence = re.split(r'(?<=[.!?])\s', paragraph, maxsplit=1)[0]
  name = entry.qualname.rpartition('.')[2].strip('_').lower()
  is_function = (
    entry.parameters is not None
    and name
    and (not entry.qualname.rpartition('.')[2].lstrip('_')[:1].isupper())
  )
  vague = len(sentence.split()) < 4 or sentence[:1] in '>(`'
  if not is_function or vague or name in sentence.lower():
    return ''
  return sentence


@functools.cache
def _described_once() -> frozenset[str]:
  """Sentences that fit one function only, in the whole library."""
  times = {}
  for _, _, entries in _documents():
    for entry in entries:
      sentence = _sentence(entry)
      times[sentence] = times.get(sentence, 0) + 1
  return frozenset(text for text, n in times.items() if text and n == 1)


def _limit_defaults(asked: list[dict]) -> list[dict]:
  """Drops the surplus of frequent defaults, picked by the questions' hash."""
  ranked = sorted(
    (item for item in asked if item['kind'] == 'default'),
    key=lambda item: hashlib.sha256(item['question'].encode()).digest(),
  )
  seen, surplus = {}, set()
  for item in ranked:
    answer = item['answers'][0]
    seen[answer] = seen.get(answer, 0) + 1
    if seen[answer] > DEFAULT_REPEATS:
      surplus.add(item['question'])
  return [item for item in asked if item['question'] not in surplus]


@functools.cache
def _documents() -> tuple[tuple[str, str, tuple[docstrings.Entry, ...]], ...]:
  """(name, text, the entries in it): what `questions` must agree with."""
  found = []
  for topic, text in sorted(_topics().items()):
    paragraphs = [(None, part) for part in text.strip().split('\n\n')]
    found += _cut(f'topics/{topic}', paragraphs)
  for module, entries in docstrings.modules():
    pieces = []
    for entry in entries:
      head = f'{module}.{entry.signature}' if entry.qualname else module
      pieces.append((entry, f'{head}\n{entry.doc}'))
    found += _cut(module, pieces)
  return tuple(found)


def _cut(name, pieces):
  """Packs (entry, text) pieces, in order, into documents of a bounded size."""
  documents, texts, entries, size = [], [], [], 0

  def close():
    number = f'#{len(documents) + 1}' if documents else ''
    documents.append((name + number, '\n\n'.join(texts) + '\n', tuple(entries)))

  for entry, text in pieces:
    length = len(text.encode())
    if texts and size + length > DOCUMENT_BYTES:
      close()
      texts, entries, size = [], [], 0
    texts.append(text)
    size += length
    if entry is not None:
      entries.append(entry)
  if texts:
    close()
  return documents


def _topics() -> dict[str, str]:
  try:
    from pydoc_data import topics
  except ImportError:  # some distributions package it apart; docstrings remain
    return {}
  return topics.topics
