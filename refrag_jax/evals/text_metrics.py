"""How a written answer is judged: exact match, F1, ROUGE.

Exact match and F1 of short answers are as the SQuAD evaluation defines them:
compared in lower case without punctuation, the articles a, an, the and surplus
white space. Summaries have ROUGE-1, -2 and -L (F-measure, with stemming) by
Google's rouge-score. With several right answers the best one counts.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence

from refrag_jax.errors import UserError

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


def rouge(kind: str, prediction: str, answers: Sequence[str]) -> float:
  """The best F-measure of ROUGE over the answers; kind such as 'rougeL'."""
  return max(
    (
      _scorer(kind).score(answer, prediction)[kind].fmeasure
      for answer in answers
    ),
    default=0.0,
  )


@functools.cache
def _scorer(kind: str):
  try:
    from rouge_score import rouge_scorer  # a second of import that few need
  except ImportError:
    raise UserError('summaries need ROUGE: pip install rouge-score') from None

  return rouge_scorer.RougeScorer([kind], use_stemmer=True)


def _f1(prediction: str, answer: str) -> float:
  predicted, wanted = normalize(prediction).split(), normalize(answer).split()
  shared = sum((Counter(predicted) & Counter(wanted)).values())
  if not shared:
    return 0.0
  precision, recall = shared / len(predicted), shared / len(wanted)
  return 2 * precision * recall / (precision + recall)


# Column of a table: metric of (prediction, right answers).
ANSWERS = {'em': exact_match, 'f1': f1}
SUMMARIES = {
  kind: functools.partial(rouge, kind)
  for kind in ('rouge1', 'rouge2', 'rougeL')
}
