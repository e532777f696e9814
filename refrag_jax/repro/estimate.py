"""Means over documents, their standard errors and bootstrap intervals.

What is estimated is a `Statistic`: differences, slopes and shares of the means
of some cells (records.py), w_1 N_1 / D_1 + w_2 N_2 / D_2 + ... where
N and D are sums of cells and D may be 1. Documents are the unit: the cells of
a document stay together when documents are drawn again.

Dimension key:
  N: documents
  R: resamples
  C: cells
  T: terms of a statistic
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Term(NamedTuple):
  weight: float
  top: Mapping[str, float]  # cell: its factor
  bottom: Mapping[str, float]  # likewise; {}: divided by 1


class Statistic(NamedTuple):
  terms: tuple[Term, ...]
  constant: float = 0.0

  def negative(self) -> 'Statistic':
    terms = (t._replace(weight=-t.weight) for t in self.terms)
    return Statistic(tuple(terms), -self.constant)


class Rule(NamedTuple):
  """How sure is sure enough: [statistics] of the claims file."""

  standard_errors: float
  resamples: int
  level: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over documents.

  `se` is None below two documents, everything but n where it cannot be
  computed; `low` and `high` are the bootstrap interval.
  """

  mean: float | None
  se: float | None
  n: int
  low: float | None
  high: float | None

  def sign(self, rule: Rule) -> int:
    """-1 or 1 where the mean is surely below or above 0, else 0."""
    if None in (self.mean, self.se, self.low, self.high):
      return 0
    if abs(self.mean) <= rule.standard_errors * self.se:
      return 0
    if self.low <= 0 <= self.high:
      return 0
    return -1 if self.mean < 0 else 1


def contrast(cells: Mapping[str, float], constant: float = 0.0) -> Statistic:
  """A sum of cells with factors, such as {'a': 1, 'b': -1}."""
  return Statistic((Term(1.0, cells, {}),), constant)


def share(start: str, reached: str, end: str) -> Statistic:
  """(start - reached) / (start - end): how much of a gap is closed.

  Of sums over documents, then divided, as in the paper's footnote 2.
  """
  top, bottom = {start: 1.0, reached: -1.0}, {start: 1.0, end: -1.0}
  return Statistic((Term(1.0, top, bottom),))


def slope(cells: Sequence[str], x: Sequence[float]) -> Statistic:
  """The least-squares slope of the cells over x."""
  mean = sum(x) / len(x)
  square = sum((value - mean) ** 2 for value in x)
  weights = ((value - mean) / square for value in x)
  return contrast(dict(zip(cells, weights, strict=True)))


def plus(*statistics: Statistic) -> Statistic:
  """The sum of some statistics."""
  terms = sum((s.terms for s in statistics), ())
  return Statistic(terms, sum(s.constant for s in statistics))


def estimates(
  statistics: Sequence[Statistic],
  cells: Sequence[str],
  value_NC: np.ndarray,
  rule: Rule,
) -> list[Estimate]:
  """Mean, standard error and interval of each statistic.

  The standard error of a share is that of its first-order change with the
  means (for sums of cells it is the ordinary one).

  Args:
    statistics: of cells among `cells`.
    cells: the names of the columns.
    value_NC: one row a document.
    rule: the bootstrap's size, level and seed; equal seeds and N draw the
      same documents.

  Returns:
    One estimate a statistic, all over the same N documents.
  """
  N = len(value_NC)
  if not N:
    return [Estimate(None, None, 0, None, None) for _ in statistics]
  mean_C = value_NC.mean(0)
  # Centred: what float32 rounds is then far below any standard error.
  drawn_RN = _draws(rule.resamples, N, rule.seed)
  centred_NC = (value_NC - mean_C).astype(np.float32)
  mean_RC = mean_C + (drawn_RN @ centred_NC).astype(np.float64) / N
  tail = (1 - rule.level) / 2
  out = []
  for statistic in statistics:
    value, change_C = _linearised(statistic, cells, mean_C)
    low, high = np.quantile(
      _evaluate(statistic, cells, mean_RC), (tail, 1 - tail)
    )
    se = None
    if N > 1:
      se = float(np.std(value_NC @ change_C, ddof=1) / math.sqrt(N))
    out.append(_finite(float(value), se, N, float(low), float(high)))
  return out


@functools.lru_cache(maxsize=4)
def _draws(resamples: int, n: int, seed: int) -> np.ndarray:
  """How often each resample has each document, float32 (R, N)."""
  rng = np.random.default_rng((seed, n))
  return rng.multinomial(n, np.full(n, 1 / n), resamples).astype(np.float32)


def _evaluate(
  statistic: Statistic, cells: Sequence[str], mean_RC: np.ndarray
) -> np.ndarray:
  """The statistic of each row of means, (R,)."""
  total_R = np.full(len(mean_RC), statistic.constant)
  for term in statistic.terms:
    top_R = mean_RC @ _factors(term.top, cells)
    bottom_R = mean_RC @ _factors(term.bottom, cells) if term.bottom else 1.0
    with np.errstate(divide='ignore', invalid='ignore'):
      total_R = total_R + term.weight * top_R / bottom_R
  return total_R


def _linearised(
  statistic: Statistic, cells: Sequence[str], mean_C: np.ndarray
) -> tuple[float, np.ndarray]:
  """The statistic at these means, and its change with each of them, (C,)."""
  change_C = np.zeros(len(cells))
  for term in statistic.terms:
    top_C, bottom_C = (
      _factors(term.top, cells),
      _factors(term.bottom, cells),
    )
    top, bottom = mean_C @ top_C, mean_C @ bottom_C if term.bottom else 1.0
    with np.errstate(divide='ignore', invalid='ignore'):
      change_C += term.weight * (top_C - bottom_C * (top / bottom)) / bottom
  return _evaluate(statistic, cells, mean_C[None])[0], change_C


def _factors(weights: Mapping[str, float], cells: Sequence[str]) -> np.ndarray:
  unknown = set(weights) - set(cells)
  if unknown:
    raise KeyError(f'no values for {sorted(unknown)}')
  return np.array([weights.get(cell, 0.0) for cell in cells])


def _finite(mean, se, n, low, high) -> Estimate:
  known = (x if x is None or math.isfinite(x) else None for x in
           (mean, se, low, high))  # fmt: skip
  mean, se, low, high = known
  return Estimate(mean, se, n, low, high)
