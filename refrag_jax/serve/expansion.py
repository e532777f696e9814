"""Which chunks of a request stay tokens: a budget, spent on the best scores.

Dimension key: C chunks of all passages.
"""

import math
from typing import NamedTuple

import numpy as np

from refrag_jax.config.schema import expanded_chunks
from refrag_jax.errors import UserError
from refrag_jax.serve.requests import Request

SELECTORS = ('rl', 'ppl_desc', 'random', 'last')


class Budget(NamedTuple):
  """How much of the context stays tokens; at most one of them is above 0."""

  fraction: float = 0.0  # p of the paper: floor(p L) of L chunks
  chunks: int = 0
  tokens: int = 0


def budget(value: float | int | str) -> Budget:
  """0.1 is a share of the chunks, 5 a number of chunks, '64t' one of tokens.

  1.0 is all of them, and 1 is one chunk.

  Raises:
    UserError: it is none of these.
  """
  text = value.strip() if isinstance(value, str) else str(value)
  wrong = UserError(
    f'expand is {value!r}: use a share from 0.0 to 1.0, a whole number of '
    'chunks, or a number of tokens such as 64t'
  )
  if isinstance(value, bool):
    raise wrong
  digits = text.removesuffix('t')
  if digits.isdecimal():
    number = int(digits)
    return Budget(tokens=number) if digits != text else Budget(chunks=number)
  try:
    share = float(text)
  except ValueError:
    raise wrong from None
  if not 0 <= share <= 1 or math.isnan(share):
    raise wrong
  return Budget(fraction=share)


def expanded(
  score_C: np.ndarray, request: Request, most: Budget, per_passage: int = 0
) -> np.ndarray:
  """Which chunks stay tokens: those of the best scores, bool (C,).

  Exactly as many as the budget allows; of tokens as many chunks as fit, each
  that does not is passed over.

  Args:
    score_C: higher is better; among equals the earlier chunk is taken.
    per_passage: the most of one passage; 0: no bound.
  """
  C = len(request.chunk_len_C)
  number, tokens = most.chunks, most.tokens
  if most.fraction:
    number = expanded_chunks(most.fraction, C)
  chosen_C = np.zeros(C, bool)
  of_passage = np.zeros(len(request.passages), int)
  for c in np.argsort(-np.asarray(score_C, np.float64), kind='stable'):
    size, place = int(request.chunk_len_C[c]), request.passage_C[c]
    if per_passage and of_passage[place] >= per_passage:
      continue
    if number > 0:
      number -= 1
    elif size <= tokens:
      tokens -= size
    else:
      continue
    chosen_C[c] = True
    of_passage[place] += 1
  return chosen_C
