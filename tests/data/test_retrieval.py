"""BM25: known rankings, ties, and words that nobody has."""

import numpy as np

from refrag_jax.data.questions import retrieval

PASSAGES = [
  'textwrap wrap: Wrap a single paragraph of text',
  'textwrap fill: Fill a single paragraph of text',
  '',
  'math gcd: Greatest Common Divisor',
  'shutil copy_file: Copy data and mode bits',
]


def top(query, k=5):
  return retrieval.top_k(retrieval.index(PASSAGES), query, k).tolist()


def test_names_fall_into_words():
  assert retrieval.words('shutil.copy_file(SRC)?') == [
    'shutil', 'copy', 'file', 'src'
  ]  # fmt: skip


def test_the_best_passage_comes_first():
  assert top('greatest divisor', 1) == [3]
  assert top('What does copy_file copy?', 1) == [4]
  assert top('wrap a paragraph', 2) == [0, 1]


def test_ties_and_unknown_words_go_by_order():
  assert top('paragraph text', 2) == [0, 1]
  alike = retrieval.index(['same words', 'x'] * 50)
  ranked = retrieval.top_k(alike, 'words', 100)
  np.testing.assert_array_equal(ranked, [*range(0, 100, 2), *range(1, 100, 2)])
  assert top('zebra', 3) == [0, 1, 2]
  assert top('', 9) == [0, 1, 2, 3, 4]


def test_scores_are_bm25():
  """Lucene's formula by hand: a word that occurs twice in one of 5 passages."""
  index = retrieval.index(PASSAGES)
  mean = (8 + 8 + 0 + 5 + 8) / 5
  norm = 1.5 * (1 - 0.75 + 0.75 * 8 / mean)
  expected = np.log(1 + (5 - 1 + 0.5) / (1 + 0.5)) * 2 / (2 + norm)
  np.testing.assert_allclose(
    retrieval.scores(index, 'Copy'), [0, 0, 0, 0, expected]
  )
  # A word that the query has twice counts twice.
  np.testing.assert_allclose(
    retrieval.scores(index, 'copy COPY')[4], 2 * expected
  )
