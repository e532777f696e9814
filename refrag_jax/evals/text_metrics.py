"""Exact match and F1 of short answers, as the SQuAD evaluation defines them.

Answers are compared in lower case without punctuation, the articles a, an, the
and surplus white space; with several right answers the best one counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize(text: str) -> str:
  """SQuAD's normalisation: case, punctuation, articles, white space.

  >>> normalize('The  Denver Broncos!')
  'denver broncos'
  """
  text = text.lower().translate(_PUNCTUATION)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
  """1.0 if the prediction is one of the answers; nothing predicted gives 0."""
  predicted = normalize(prediction)
  return float(
    bool(predicted) and any(predicted == normalize(text) for text in answers)
  )


def f1(prediction: str, answers: Sequence[str]) -> float:
  """The best F1 of shared words, counted with repeats, over the answers."""
  return max((_f1(prediction, answer) for answer in answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
  predicted, wanted = normalize(prediction).split(), normalize(answer).split()
  shared = sum((Counter(predicted) & Counter(wanted)).values())
  if not shared:
    return 0.0
  precision, recall = shared / len(predicted), shared / len(wanted)
  return 2 * precision * recall / (precision + recall)
