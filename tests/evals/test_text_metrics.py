"""Exact match and F1 against SQuAD's published examples."""

import pytest

from refrag_jax.evals.text_metrics import exact_match, f1, normalize


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('The  Denver Broncos!', 'denver broncos'),
    ('an apple, a day', 'apple day'),
    ('Theatre', 'theatre'),  # articles are whole words
    ('TextWrapper.wrap', 'textwrapperwrap'),
    ('The', ''),
    ('', ''),
  ],
)
def test_normalize(text, expected):
  assert normalize(text) == expected


# SQuAD dev set, "Super Bowl 50": the three annotators' answers.
DENVER = ['Denver Broncos', 'Denver Broncos', 'Denver Broncos']
SANTA_CLARA = [
  'Santa Clara, California',
  "Levi's Stadium",
  "Levi's Stadium in the San Francisco Bay Area at Santa Clara, California.",
]


@pytest.mark.parametrize(
  ('prediction', 'answers', 'em', 'score'),
  [
    ('the Denver Broncos.', DENVER, 1, 1),
    ('Denver', DENVER, 0, 2 / 3),
    ('Carolina Panthers', DENVER, 0, 0),
    ("Levi's Stadium", SANTA_CLARA, 1, 1),
    # 5 words, 2 of the 2 of the second answer: precision 2/5, recall 1; of the
    # third 5 of 11: better.
    ("Levi's Stadium in San Francisco", SANTA_CLARA, 0, 2 * 5 / (5 + 11)),
    # Repeated words count once each: shared 1, precision 1/3, recall 1/2.
    ('Denver Denver Denver', DENVER, 0, 2 * (1 / 3) * (1 / 2) / (5 / 6)),
    ('', DENVER, 0, 0),
    ('the', ['the', 'a'], 0, 0),  # nothing is left of either
    ('x', [], 0, 0),
  ],
)
def test_best_answer_counts(prediction, answers, em, score):
  assert exact_match(prediction, answers) == em
  assert f1(prediction, answers) == pytest.approx(score)
