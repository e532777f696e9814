"""Question files as they are published, each record made into the DPR form.

What form a record has, its fields tell; a file has that of its first record
which says anything. A reader here gives dicts of the DPR form (see records.py),
with two fields more that only these need: `whole` true where the passages are
one text in order, `all_gold` where every gold passage is needed and not any of
them.
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

# What a text to summarise is asked, where its record asks nothing.
SUMMARISE = 'Summarize this text.'
LETTERS = string.ascii_uppercase
# "A. an option", and the same with a bracket or a colon.
OPTION = re.compile(r'\s*\(?([A-Z])\s*[.):]\s+(.*)', re.S)
LETTER = re.compile(r'\s*\(?([A-Z])\s*[.):]?\s*')


class Unusable(ValueError):
  """Why a record cannot be used, in words for the count."""


class Form(NamedTuple):
  """One way to write questions down."""

  name: str  # for messages
  fields: tuple[str, ...]  # what tells it from the others
  read: Callable[[dict[str, Any]], Iterable[dict[str, Any]]]


def squad_file(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """SQuAD as it is downloaded: all articles in one object."""
  for article in record['data']:
    for paragraph in article['paragraphs']:
      yield from squad({'title': article.get('title')} | paragraph)


def squad(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """A paragraph with its questions (MRQA too)."""
  for asked in record['qas']:
    name = asked.get('id', asked.get('qid'))
    yield from squad_question(
      {'title': record.get('title'), 'context': record['context']}
      | asked
      | {'id': name}
    )


def squad_question(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """One question of SQuAD as the Hugging Face hub has it, or of a paragraph.

  Answers are texts, {"text": ...}, or {"text": [...]} of all of them.
  """
  answers = record.get('answers')
  if isinstance(answers, dict):
    answers = answers.get('text')
  if isinstance(answers, list):
    answers = [a.get('text') if isinstance(a, dict) else a for a in answers]
    answers = list(dict.fromkeys(map(str, answers)))
  gold = {'title': record.get('title'), 'text': record['context'], 'gold': True}
  yield {
    'id': record.get('id'),
    'question': record.get('question'),
    'answers': answers,  # what is no list is counted by who reads it
    'ctxs': [gold],
  }


def hotpot(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """HotpotQA and 2WikiMultihopQA: paragraphs of sentences, some support.

  Pairs of (title, sentences), or, on the hub, {"title": [], "sentences": []}.
  """
  facts, context = record['supporting_facts'], record['context']
  if isinstance(facts, dict):
    support = set(facts['title'])
  else:
    support = {title for title, _ in facts}
  if isinstance(context, dict):
    context = zip(context['title'], context['sentences'], strict=True)
  context = list(context)
  if support - {title for title, _ in context}:
    raise Unusable('a passage that supports the answer is not there')
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
      for title, sentences in context
    ],
  }


def musique(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """MuSiQue: paragraphs, marked where they support the answer."""
  marks = [p['is_supporting'] for p in record['paragraphs']]
  if not all(isinstance(mark, bool) for mark in marks):
    raise Unusable("'is_supporting' that is neither true nor false")
  yield _answered(record) | {
    'all_gold': True,
    'ctxs': [
      {'title': p.get('title'), 'text': p['paragraph_text'], 'gold': mark}
      for p, mark in zip(record['paragraphs'], marks, strict=True)
    ],
  }


def multiple_choice(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Options as a list, one a line, by letter, or {"text": [], "label": []}.

  The answer is an option's letter, its text or its number from 0. With a
  passage, or passages, as in the other forms.
  """
  options = record.get('options', record.get('choices'))
  labels = list(LETTERS)
  if isinstance(options, str):
    options = [line for line in options.split('\n') if line.strip()]
  elif isinstance(options, dict) and isinstance(options.get('text'), list):
    labels = [str(label) for label in options.get('label', labels)]
    options = options['text']
  elif isinstance(options, dict):
    labels, options = list(options), list(options.values())
  if not all(isinstance(option, str) for option in options):
    raise Unusable('an option that is no text')
  if not 2 <= len(options) <= len(LETTERS):
    raise Unusable(f'options that are fewer than 2 or more than {len(LETTERS)}')
  marked = [OPTION.fullmatch(option) for option in options]
  texts = options
  if all(m and m[1] == x for m, x in zip(marked, LETTERS, strict=False)):
    texts = [match[2] for match in marked]
  right = _right(
    record.get('answer', record.get('answerKey')), options, texts, labels
  )
  listed = '\n'.join(f'{x}. {o}' for x, o in zip(LETTERS, texts, strict=False))
  yield _given(record) | {
    'question': f'{record["question"]}\n{listed}',
    'answers': [LETTERS[right]],
    'choices': list(LETTERS[: len(texts)]),
  }


def _right(answer: Any, options, texts, labels) -> int:
  """Which option is the right one."""
  if isinstance(answer, int) and not isinstance(answer, bool):
    if 0 <= answer < len(options):
      return answer
  elif isinstance(answer, str):
    for among in (options, texts, labels[: len(options)]):
      if list(among).count(answer) == 1:
        return list(among).index(answer)
    match = LETTER.fullmatch(answer) or OPTION.fullmatch(answer)
    if match and match[1] in labels[: len(options)]:
      return labels.index(match[1])
  raise Unusable("an 'answer' that names none of the options")


def one_passage(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """BoolQ and its like: a question, its passage, its answer."""
  yield _given(_answered(record))


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
  answer, more = record['answer'], record.get('answer_aliases', [])
  if isinstance(answer, bool):
    answer = 'yes' if answer else 'no'
  listed = lambda x: x if isinstance(x, list) else [x]
  return record | {'answers': [*listed(answer), *listed(more)]}


def _given(record: dict[str, Any]) -> dict[str, Any]:
  if 'passage' not in record:
    return record
  gold = {'title': record.get('title'), 'text': record['passage'], 'gold': True}
  return record | {'ctxs': [gold]}


DPR = Form('DPR', (), lambda record: [record])
# The first whose fields a record has.
FORMS = (
  Form('header', ('header',), lambda record: []),  # MRQA's first line
  Form('SQuAD', ('data',), squad_file),
  Form('SQuAD', ('context', 'qas'), squad),
  Form('HotpotQA', ('question', 'context', 'supporting_facts'), hotpot),
  Form('SQuAD', ('question', 'context', 'answers'), squad_question),
  Form('MuSiQue', ('question', 'answer', 'paragraphs'), musique),
  Form('multiple choice', ('question', 'answer', 'options'), multiple_choice),
  Form('multiple choice', ('question', 'answer', 'choices'), multiple_choice),
  Form(
    'multiple choice', ('question', 'answerKey', 'choices'), multiple_choice
  ),
  Form('one passage', ('question', 'answer', 'passage'), one_passage),
  Form('summaries', ('text', 'summary'), summary),
  DPR,
)


def form_of(record: dict[str, Any]) -> Form:
  """The form that a record's fields tell."""
  return next(form for form in FORMS if record.keys() >= set(form.fields))
