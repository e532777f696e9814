"""What stands around passages and answer, in ids: the templates of a config.

In training and in answering alike (examples.py, serve/requests.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refrag_jax.data.questions.records import fill
from refrag_jax.errors import UserError


class Templates(NamedTuple):
  """What stands around a question, and what room it leaves."""

  begin: Sequence[int]  # before everything
  end: Sequence[int]  # between everything and the answer
  answer_room: int  # for an answer and EOS
  given: np.ndarray | None  # before every answer; None: it has the question


class Around(NamedTuple):
  """One question's."""

  prefix: np.ndarray  # int32, before the passages
  given: np.ndarray  # int32, between them and the answer
  cut: bool  # whether the question had to be cut


def templates(data: Any, tokenizer: Any) -> Templates:
  """The templates of a `DataConfig`.

  Raises:
    UserError: they leave no room for a question or an answer.
  """
  begin, end = [tokenizer.bos_id], []
  if data.chat:
    begin, end = tokenizer.chat_frame()
  encode = lambda template: tokenizer.encode(fill(template, question=''))[0]
  behind, given = encode(data.answer_template), None
  room = data.answer_length - len(end)
  taken = [len(begin) + len(encode(data.question_template))]
  if '{question}' in data.answer_template:
    taken.append(len(behind))
  else:
    given = np.concatenate([behind, end]).astype(np.int32)
    room -= len(behind)
  if max(taken) >= data.question_length:
    raise UserError(
      f'config.data.question_length is {data.question_length}, which is filled '
      'by what stands around a question: raise it'
    )
  if room < 2:
    raise UserError(
      f'config.data.answer_length is {data.answer_length}, which is filled by '
      'what stands before an answer: raise it'
    )
  return Templates(begin, end, room, given)


def around(
  question: str, data: Any, found: Templates, tokenizer: Any, longest: int
) -> Around:
  """What stands around a question's passages and answer.

  Args:
    longest: the most tokens with a question in them, before or behind; one too
      long loses its beginning (a conversation ends in what is asked).
  """
  prefix, cut = _filled(
    data.question_template, question, found.begin, (), tokenizer, longest
  )
  given, cut_behind = found.given, False
  if given is None:
    given, cut_behind = _filled(
      data.answer_template, question, (), found.end, tokenizer, longest
    )
  return Around(prefix, given, cut or cut_behind)


def _filled(
  template: str, question: str, begin, end, tokenizer, longest: int
) -> tuple[np.ndarray, bool]:
  """A filled template between ids, and whether it was cut."""
  ids = tokenizer.encode(fill(template, question=question))[0]
  room = longest - len(begin)
  cut = '{question}' in template and len(ids) > room
  if cut:
    head = template.partition('{question}')[0]
    head = tokenizer.encode(head)[0][: room - 1]
    ids = np.concatenate([head, ids[len(ids) - room + len(head) :]])
  return np.concatenate([begin, ids, end]).astype(np.int32), cut
