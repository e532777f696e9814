"""Lexical retrieval: BM25 over passages; the only file that imports bm25s.

A retriever without training is an honest source of realistic mistakes: what it
returns shares words with the question, and the gold passage may be missing.
"""

import importlib.util
import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from refrag_jax.errors import UserError

# Lucene's variant with the constants that published BM25 baselines use.
K1, B = 1.5, 0.75


def words(text: str) -> list[str]:
  """Lower-case words; a dotted or underscored name falls into its parts.

  >>> words('What does TextWrapper.wrap_all do?')
  ['what', 'does', 'textwrapper', 'wrap', 'all', 'do']
  """
  return re.findall(r'[^\W_]+', text.lower())


def require() -> None:
  """Refuses questions where the package that ranks passages is missing."""
  if importlib.util.find_spec('bm25s') is None:
    raise UserError('questions need bm25s: pip install "bm25s>=0.2"')


def index(passages: Sequence[str]) -> Any:
  """Scores every word of every passage, once."""
  require()
  import bm25s  # here: it runs a JAX computation when it is imported

  logging.getLogger('bm25s').setLevel(logging.WARNING)  # it says DEBUG

  found = bm25s.BM25(k1=K1, b=B, method='lucene')
  found.index([words(text) for text in passages], show_progress=False)
  return found


def scores(found: Any, query: str) -> np.ndarray:
  """Every passage's BM25 score, float[passages]; 0 where no word is known."""
  known = [word for word in words(query) if word in found.vocab_dict]
  if not known:
    return np.zeros(found.scores['num_docs'])
  return found.get_scores(known)


def top_k(found: Any, query: str, k: int) -> np.ndarray:
  """The k best passages of a query, best first.

  Ties go to the earlier passage: the answer depends on nothing but the texts.

  Args:
    found: what `index` returned.
    query: the question.
    k: how many to return, at most.

  Returns:
    int32[min(k, passages)], numbers of passages.
  """
  ranked = np.argsort(-scores(found, query), kind='stable')
  return ranked[:k].astype(np.int32)
