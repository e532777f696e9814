"""What every number of a run goes through: means and standard errors.

A number that is reported is a STAT, `{"mean", "se", "n"}`. The unit is the
document: windows of one document are not independent and tokens even less, so
values are first averaged within a document, and the standard error is the one
of the document means. Comparisons are paired on the same documents.

Dimension key:
  W: windows (or examples)
  N: documents
"""

import math
from typing import Any

import numpy as np

STANDARD_ERRORS = 3.0  # a difference counts from here on


def by_document(values_W: np.ndarray, doc_W: np.ndarray) -> np.ndarray:
  """Averages windows within their documents.

  Args:
    values_W: float[W], one value a window.
    doc_W: int[W], the document of each window.

  Returns:
    float64[N], in the order of the sorted document numbers, so that two calls
    over the same documents can be paired.
  """
  values_W = np.asarray(values_W, np.float64)
  doc_W = np.asarray(doc_W)
  if values_W.shape != doc_W.shape or values_W.ndim != 1:
    raise ValueError(f'one document a value: {values_W.shape}, {doc_W.shape}')
  _, index_W = np.unique(doc_W, return_inverse=True)
  count_N = np.bincount(index_W)
  return np.bincount(index_W, weights=values_W) / count_N


def stat(values_N: np.ndarray) -> dict[str, float | int | None]:
  """Mean and standard error of document means; `se` is None below two."""
  values_N = np.asarray(values_N, np.float64)
  n = values_N.size
  return {
    'mean': _finite(np.mean(values_N)) if n else None,
    'se': _finite(np.std(values_N, ddof=1) / np.sqrt(n)) if n > 1 else None,
    'n': n,
  }


def paired(a_N: np.ndarray, b_N: np.ndarray) -> dict[str, float | int | None]:
  """The STAT of a - b over the same documents."""
  a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
  if a_N.shape != b_N.shape:
    raise ValueError(f'not the same documents: {a_N.shape} and {b_N.shape}')
  return stat(a_N - b_N)


def significant(value: dict[str, Any]) -> bool:
  """Whether a difference is above three of its own standard errors."""
  mean, se = value.get('mean'), value.get('se')
  if mean is None or se is None:
    return False
  return abs(mean) > STANDARD_ERRORS * se


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None
