"""The curriculum of the paper's Table 8, scaled to any number of steps.

Table 8 gives, for each of nine stages, how many samples have 1, 2, 4, ... 256
chunks. Its rows are geometric sequences, and three numbers a row generate all
81 cells (`TABLE8` below). They are read as mixture weights over the budget of
steps; rows above the run's context are dropped and the rest renormalised.
"""

import io
from collections.abc import Sequence

import numpy as np

from refrag_jax.errors import UserError

NUM_STAGES = 9
NUM_ROWS = 9  # factors 1, 2, 4, ... 256


def _row(i: int) -> np.ndarray:
  """Cells of factor 2**i: a geometric sequence with known start and sum."""
  first = max(1, int(4000 / 3 / 4**i))
  total = 2000 if i <= 2 else 4000 if i <= 5 else 8000
  powers = np.arange(NUM_STAGES)
  low, high = 0.0, 10.0
  for _ in range(100):  # first * sum_t ratio^t = total, increasing in ratio
    ratio = (low + high) / 2
    if first * np.sum(ratio**powers) < total:
      low = ratio
    else:
      high = ratio
  return np.rint(first * ratio**powers).astype(np.int64)


TABLE8 = np.stack([_row(i) for i in range(NUM_ROWS)], axis=1)  # [stage, row]
FACTORS = tuple(2**i for i in range(NUM_ROWS))


def weights(factors: Sequence[int]) -> np.ndarray:
  """Returns the cells of Table 8 for these factors, int64[9, n].

  Raises:
    UserError: factors are not ascending, or not of Table 8.
  """
  if tuple(factors) != tuple(sorted(set(factors))) or not factors:
    raise UserError(f'curriculum factors {tuple(factors)}: give them ascending')
  if len(factors) == 1:  # no curriculum: one length throughout
    return np.ones((NUM_STAGES, 1), np.int64)
  unknown = [f for f in factors if f not in FACTORS]
  if unknown:
    raise UserError(
      f'curriculum factor {unknown[0]} is not in Table 8: powers of two from '
      '1 to 256'
    )
  return TABLE8[:, [FACTORS.index(f) for f in factors]]


def counts(num_steps: int, factors: Sequence[int]) -> np.ndarray:
  """Returns the steps of each stage and factor, int64[9, n], sum num_steps."""
  cells = weights(factors)
  stages = apportion(num_steps, cells.sum(axis=1))
  return np.stack(
    [apportion(n, row) for n, row in zip(stages, cells, strict=True)]
  )


def schedule(num_steps: int, factors: Sequence[int], seed: int) -> np.ndarray:
  """Returns the factor of every step, int32[num_steps].

  The nine stages follow each other; inside one the factors are shuffled, for
  a stage is a mixture and not a second, finer curriculum.
  """
  rng = np.random.Generator(np.random.Philox(key=[seed, 8]))
  steps = [
    rng.permutation(np.repeat(np.asarray(factors, np.int32), row))
    for row in counts(num_steps, factors)
  ]
  return np.concatenate(steps).astype(np.int32)


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
  """Splits `total` into int (n,) by largest remainder; ties go to the first.

  Args:
    shares: (n,), of any sum.
  """
  exact = total * shares / shares.sum()
  whole = np.floor(exact).astype(np.int64)
  order = np.argsort(whole - exact, kind='stable')
  whole[order[: total - whole.sum()]] += 1
  return whole


def table(num_steps: int, factors: Sequence[int], chunk_size: int):
  """Returns the curriculum as a rich table: steps by factor and stage."""
  from rich.table import Table

  out = Table(title=f'Curriculum: {num_steps} steps (Table 8 as weights)')
  out.add_column('chunks x tokens')
  for t in range(NUM_STAGES):
    out.add_column(f'stage {t + 1}', justify='right')
  out.add_column('sum', justify='right')
  steps = counts(num_steps, factors)
  for i, factor in enumerate(factors):
    cells = [*steps[:, i], steps[:, i].sum()]
    out.add_row(f'{factor} x {chunk_size}', *(str(c) for c in cells))
  cells = [*steps.sum(axis=1), steps.sum()]
  out.add_row('all', *(str(c) for c in cells))
  return out


def plot(
  num_steps: int, factors: Sequence[int], chunk_size: int, path: str = ''
) -> str:
  """Draws each factor's share per stage (the paper's Figure 6) as SVG.

  Args:
    path: where to save the picture; '' saves nothing.

  Returns:
    The SVG text.
  """
  import matplotlib
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  steps = counts(num_steps, factors)
  bounds = np.concatenate([[0], np.cumsum(steps.sum(axis=1))])
  share = steps / np.maximum(steps.sum(axis=1, keepdims=True), 1)
  figure = Figure(figsize=(6, 3), layout='constrained')
  FigureCanvasSVG(figure)
  axes = figure.add_subplot()
  axes.stackplot(
    bounds,
    np.concatenate([share, share[-1:]]).T,
    labels=[f'{f} x {chunk_size}' for f in factors],
    step='post',
  )
  axes.set(
    xlabel='step', ylabel='share of steps', xlim=(0, num_steps), ylim=(0, 1)
  )
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize='small')
  out = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': 'refrag_jax'}):  # same names
    figure.savefig(out, format='svg', metadata={'Date': None})
  if path:
    with open(path, 'w', encoding='utf-8') as f:
      f.write(out.getvalue())
  return out.getvalue()
