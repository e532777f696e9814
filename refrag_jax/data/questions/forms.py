"""Question files as they are published, each record made into the DPR form.

A file has one form, that of its first record; what it is, its fields tell. A
reader here gives dicts of the DPR form (see records.py), with two fields more
that only these need: `whole` true where the passages are one text in order,
`all_gold` where every gold passage is needed and not any of them.
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

# What a text to summarise is asked, where its record asks nothing.
SUMMARISE = 'Summarize this text.'
LETTERS = string.ascii_uppercase
# "A. an option", and the same with a bracket or a colon.
OPTION = re.compile(r'\s*([A-Z])\s*[.):]\s+(.*)', re.S)


class Form(NamedTuple):
  """One way to write questions down."""

  name: str  # for messages
  fields: tuple[str, ...]  # what tells it from the others
  read: Callable[[dict[str, Any]], Iterable[dict[str, Any]]]


def squad(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """A paragraph with its questions; an answer is a text or {"text": ...}."""
  gold = {'title': record.get('title'), 'text': record['context'], 'gold': True}
  for asked in record['qas']:
    answers = [a['text'] if isinstance(a, dict) else a
               for a in asked.get('answers', ())]  # fmt: skip
    yield {
      'id': asked.get('id'),
      'question': asked.get('question'),
      'answers': list(dict.fromkeys(answers)),
      'ctxs': [gold],
    }


def hotpot(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """HotpotQA and 2WikiMultihopQA: paragraphs of sentences, some support."""
  support = {title for title, _ in record['supporting_facts']}
  yield _answered(record) | {
    'all_gold': True,
    'ctxs': [
      {
        'title': title,
        # Sentences bring their own blanks, or none does.
        'text': ('' if any(s[:1].isspace() for s in sentences) else ' ').join(
          sentences
        ),
        'gold': title in support,
      }
      for title, sentences in record['context']
    ],
  }


def musique(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """MuSiQue: paragraphs, marked where they support the answer."""
  yield _answered(record) | {
    'all_gold': True,
    'ctxs': [
      {
        'title': p.get('title'),
        'text': p['paragraph_text'],
        'gold': p['is_supporting'],
      }
      for p in record['paragraphs']
    ],
  }


def multiple_choice(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Options as a list, or one a line; the answer is a letter, text or number.

  With a passage, or passages, as in the other forms.
  """
  options = record.get('options', record.get('choices'))
  if isinstance(options, str):
    options = options.strip().split('\n')
  options = [match[2] if (match := OPTION.match(o)) else o for o in options]
  answer = record['answer']
  letters = LETTERS[: len(options)]
  if isinstance(answer, str):
    match = OPTION.match(answer)
    if match and match[1] in letters:
      answer = letters.index(match[1])
    elif answer in tuple(letters):
      answer = letters.index(answer)
    else:
      answer = options.index(answer)
  listed = '\n'.join(f'{x}. {o}' for x, o in zip(letters, options, strict=True))
  yield _given(record) | {
    'question': f'{record["question"]}\n{listed}',
    'answers': [letters[answer]],
    'choices': list(letters),
  }


def one_passage(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """BoolQ and its like: a question, its passage, its answer."""
  yield _answered(record) | _given(record)


def summary(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """A text and its summary, or several that are right."""
  summaries = record['summary']
  yield record | {
    'question': record.get('question') or SUMMARISE,
    'answers': [summaries] if isinstance(summaries, str) else summaries,
    'ctxs': [
      {'title': record.get('title'), 'text': record['text'], 'gold': True}
    ],
    'whole': True,
  }


def _answered(record: dict[str, Any]) -> dict[str, Any]:
  answer = record['answer']
  first = answer if isinstance(answer, list) else [answer]
  return record | {'answers': [*first, *record.get('answer_aliases', ())]}


def _given(record: dict[str, Any]) -> dict[str, Any]:
  if 'passage' not in record:
    return record
  gold = {'title': record.get('title'), 'text': record['passage'], 'gold': True}
  return record | {'ctxs': [gold]}


DPR = Form('DPR', (), lambda record: [record])
# The first whose fields a record has.
FORMS = (
  Form('SQuAD', ('context', 'qas'), squad),
  Form('HotpotQA', ('question', 'context', 'supporting_facts'), hotpot),
  Form('MuSiQue', ('question', 'answer', 'paragraphs'), musique),
  Form('multiple choice', ('question', 'answer', 'options'), multiple_choice),
  Form('multiple choice', ('question', 'answer', 'choices'), multiple_choice),
  Form('one passage', ('question', 'answer', 'passage'), one_passage),
  Form('summaries', ('text', 'summary'), summary),
  DPR,
)


def form_of(record: dict[str, Any]) -> Form:
  """The form that a record's fields tell."""
  return next(form for form in FORMS if record.keys() >= set(form.fields))
