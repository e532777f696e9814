"""The embedded text and questions: the same everywhere, and answerable."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest

from refrag_jax.data.text import docstrings, stdlib
from refrag_jax.evals import text_metrics


@pytest.fixture(scope='module')
def questions():
  return stdlib.questions()


def digest():
  everything = ''.join(f'{name}\n{text}' for name, text in stdlib.documents())
  return hashlib.sha256(everything.encode()).hexdigest()


def test_documents_are_about_2_mb_in_hundreds_of_bounded_pieces():
  sizes = [len(text.encode()) for _, text in stdlib.documents()]
  assert 1.5e6 < sum(sizes) < 5e6
  assert len(sizes) > 500
  # Single entries and paragraphs are never cut.
  assert sum(size > 2 * stdlib.DOCUMENT_BYTES for size in sizes) < 60
  names = [name for name, _ in stdlib.documents()]
  assert len(set(names)) == len(names)


def test_another_interpreter_finds_the_same_text():
  program = (
    'import sys, hashlib; sys.excepthook = print\n'
    'from refrag_jax.data.text import stdlib\n'
    "text = ''.join(f'{name}\\n{text}' for name, text in stdlib.documents())\n"
    'print(hashlib.sha256(text.encode()).hexdigest())'
  )
  out = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == digest()


def test_parsing_imports_nothing_new():
  program = (
    'import sys\n'
    'from refrag_jax.data.text import stdlib\n'
    'import refrag_jax.data.text.sources\n'
    'before = set(sys.modules)\n'
    'list(stdlib.documents())\n'
    'print(sorted(set(sys.modules) - before))'
  )
  out = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  allowed = {'gc', 'pydoc_data', 'pydoc_data.topics'}
  assert set(eval(out.stdout)) <= allowed


def test_signatures_are_read_as_help_shows_them(tmp_path):
  path = tmp_path / 'sample.py'
  path.write_text(
    '"""A module."""\n'
    'class A(B):\n'
    '  """A class."""\n'
    '  def __init__(self, x: int, y=(1, 2)):\n'
    '    pass\n'
    '  @property\n'
    '  def size(self):\n'
    '    """Its size."""\n'
    '  @staticmethod\n'
    '  def make(first, *rest, last=None, **others):\n'
    '    """Makes one."""\n'
    'def f(a, /, b, *, c="d") -> None:\n'
    '  """Does it."""\n'
  )
  entries = docstrings._source_entries('sample', str(path))
  assert [(e.signature, e.positional) for e in entries] == [
    ('', 0),
    ('A(x, y=(1, 2))', 2),
    ('A.size', 0),
    ('A.make(first, *rest, last=None, **others)', 1),
    ("f(a, b, *, c='d')", 2),
  ]


def test_there_are_enough_questions_of_each_kind(questions):
  kinds = Counter(item['kind'] for item in questions)
  assert set(kinds) == {'default', 'parameter', 'describes'}
  assert min(kinds.values()) > 300
  asked = [item['question'] for item in questions]
  assert len(set(asked)) == len(asked)
  assert max(len(q.encode()) for q in asked) <= stdlib.QUESTION_BYTES


def test_passages_hold_the_answer_and_fit(questions):
  for item in questions:
    gold = item['ctxs'][0]
    assert gold['gold']
    assert item['answers'][0] in gold['text']
    for ctx in item['ctxs']:
      assert len((ctx['title'] + ctx['text']).encode()) <= 126


def test_distractors_are_others_of_the_same_module(questions):
  for item in questions:
    gold, *others = item['ctxs']
    assert len(others) >= stdlib.FEWEST_PASSAGES - 1
    assert {ctx['title'] for ctx in others} == {gold['title']}
    assert not any(ctx.get('gold') for ctx in others)
    assert gold['text'] not in [ctx['text'] for ctx in others]


def test_a_question_has_one_right_passage(questions):
  """The name that is asked about, or the sentence, is in no other passage."""
  for item in questions:
    names = [ctx['text'].split('(')[0].split('\n')[0] for ctx in item['ctxs']]
    assert len(set(names)) == len(names), item['question']
    if item['kind'] == 'describes':
      sentence = item['question'].partition('? ')[2]
      holding = [ctx for ctx in item['ctxs'] if sentence in ctx['text']]
      assert len(holding) == 1, item['question']
      last = names[0].rpartition('.')[2].strip('_').lower()
      assert last not in sentence.lower()


def test_known_questions(questions):
  answers = {item['question']: item['answers'] for item in questions}
  assert answers['What is the 2nd parameter of textwrap.wrap?'] == ['width']
  assert answers['What is the default of width in textwrap.wrap?'] == ['70']


def test_no_default_can_be_guessed(questions):
  defaults = [q['answers'][0] for q in questions if q['kind'] == 'default']
  most = Counter(defaults).most_common(1)[0][1]
  assert most <= stdlib.DEFAULT_REPEATS
  assert most / len(defaults) < 0.15


def test_answers_survive_the_normalisation_of_exact_match(questions):
  for item in questions:
    assert text_metrics.exact_match(item['answers'][0], item['answers']) == 1


def test_questions_do_not_depend_on_the_call(questions):
  assert stdlib.questions() == questions
  # A smaller room drops and cuts passages and asks nothing new.
  small = {item['question'] for item in stdlib.questions(64)}
  assert 0 < len(small) < len(questions)
