"""Passages to answer from, as people bring them.

JSONL (also .gz or .zst) with an object a line, "text" and perhaps "title" and
"id"; or plain text, a passage between blank lines.
"""

import os
import re
from typing import NamedTuple

from refrag_jax.data.text import sources
from refrag_jax.errors import UserError
from refrag_jax.runtime.paths import refuse_pointer


class Passage(NamedTuple):
  """A text to answer from."""

  text: str
  title: str = ''
  id: str = ''


def read(path: str) -> list[Passage]:
  """The passages of a file, in its order; blank ones too.

  Raises:
    UserError: there is no such file, it is no text, or a line is no passage;
      it names the line.
  """
  if not os.path.isfile(path):
    raise UserError(
      f'passages {path} are not there: give a JSONL file of {{"text": ...}}, '
      'or a .txt file with blank lines between them'
    )
  refuse_pointer(path)
  if path.endswith('.txt'):
    return [Passage(text) for text in _paragraphs(path)]
  found, ids = [], {}
  for number, value in sources.json_values(path):
    where = f'{path}, line {number}'
    if value is sources.INVALID:
      raise UserError(
        f'{where}: no JSON; give one object a line, such as '
        '{"text": "A passage."}'
      )
    passage = of_record(value, where)
    if passage.id and ids.setdefault(passage.id, number) != number:
      raise UserError(
        f'{where}: id {passage.id!r} is that of line {ids[passage.id]} as well'
      )
    found.append(passage)
  return found


def of_record(record: object, where: str) -> Passage:
  """The passage that a JSON object is.

  Raises:
    UserError: it is none.
  """
  if isinstance(record, str):
    return Passage(record)
  if not isinstance(record, dict) or not isinstance(record.get('text'), str):
    raise UserError(
      f'{where}: {record!r:.60} is no passage: give {{"text": ...}}, and '
      'perhaps "title" and "id"'
    )
  title, name = record.get('title') or '', record.get('id', '')
  if not isinstance(title, str) or not isinstance(name, str | int):
    raise UserError(f'{where}: title and id of a passage must be text')
  return Passage(record['text'], title, str(name))


def _paragraphs(path: str) -> list[str]:
  with open(path, 'rb') as f:
    data = f.read()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError:
    raise UserError(f'{path} is not in UTF-8') from None
  parts = re.split(r'\n\s*\n', text.replace('\r\n', '\n'))
  return [part.strip() for part in parts if part.strip()]
