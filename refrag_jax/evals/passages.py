"""Selection where the useful text may stand anywhere: is its gain recency?

Dimension key: W windows, P passages of a context, C chunks of all of them, O
outputs.

In plain text the chunk nearest to the output is nearly always the best one to
expand, so a selector may have learnt no more than that (evals/selection.py).
Here a context is P passages, each cut into chunks on its own: the one that
stands directly before the output in its document, at a place drawn for each
window, and P - 1 that do so in other documents of the data set. As many chunks
in all as the model was trained on.

Rows: nothing expanded, each selector at each p, and `useful_p<p>`, which
expands the useful passage from its end backwards, and nothing else if that is
fewer chunks. Column `nll`, and `hit`: the share of the expanded chunks that lie
in the useful passage; row `chance` is what random ones hit on average, 1 / P.
"""

import jax.numpy as jnp
import numpy as np

from refrag_jax.config.schema import Config, expanded_chunks
from refrag_jax.data import batch
from refrag_jax.errors import UserError
from refrag_jax.evals import common, selection
from refrag_jax.evals.eval import Eval
from refrag_jax.report import tables
from refrag_jax.runtime.progress import say


def run(context: common.Context) -> dict:
  """The `passages` table of results.json."""
  config = context.session.config
  P = config.eval.num_passages
  if not P or not selection.selecting_role(context):
    return {}
  length, _ = one_passage(config)
  out = {}
  for name in context.datasets:
    windows = common.text_windows(context, name, length)
    doc_W = windows['doc_B']
    if len(np.unique(doc_W)) < 2:
      say(f'eval passages leaves {name} out: it needs two documents')
      continue
    source_WP, place_W = places(doc_W, P)
    documents = context.documents_of('passages', name)
    # Where the useful passage of each window stood, for later questions.
    documents['windows'] = {'doc': doc_W, 'place': place_W}
    out[name] = common.table(
      measure(context, batch.side_by_side(windows, source_WP), place_W, P),
      doc_W,
      ['none', 'chance']
      + [
        f'{row}_p{p:g}'
        for row in ('random', 'last', 'useful')
        for p in config.eval.expand_fractions
      ],
      documents,
    )
  return out


def places(
  doc_W: np.ndarray, num_passages: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Which windows' contexts stand side by side before each window's output.

  Its own at a random place, beside it those of other documents, no document
  twice unless there are too few.

  Returns:
    source_WP, rows of the windows, and place_W, where the own one stands.
  """
  rng = np.random.default_rng(seed)
  docs, index_W = np.unique(doc_W, return_inverse=True)
  of_doc = [np.flatnonzero(index_W == d) for d in range(len(docs))]
  few = len(docs) < num_passages
  place_W = rng.integers(num_passages, size=len(doc_W))
  source_WP = np.empty((len(doc_W), num_passages), np.int64)
  for w, d in enumerate(index_W):
    others = rng.choice(len(docs) - 1, num_passages - 1, replace=few)
    others += others >= d  # all but its own
    rows = [rng.choice(of_doc[other]) for other in others]
    source_WP[w] = np.insert(rows, place_W[w], w)
  return source_WP, place_W


def measure(
  context: common.Context, windows: dict, place_W: np.ndarray, P: int
) -> dict[str, dict[str, np.ndarray]]:
  """Row -> column -> value of every window, (W,)."""
  config = context.session.config
  role = selection.selecting_role(context)
  W, C = windows['chunk_len_BC'].shape
  useful_WC = np.arange(C) // (C // P) == place_W[:, None]
  # Its end first; nothing else is ever among the best C / P.
  from_end_WC = np.where(useful_WC, np.arange(C), -1.0)

  def row(score_WC, draws):
    score_WC = np.asarray(score_WC, np.float32)
    nll_WO = selection.selected_nll(context, role, windows, score_WC, draws)
    columns = {'nll': nll_WO.mean(1)}
    if draws:
      mask_WC = selection.expand_top(jnp.asarray(score_WC), draws, 0)
      columns['hit'] = (np.asarray(mask_WC) & useful_WC).sum(1) / draws
    return columns

  rows = {
    'none': row(np.zeros((W, C)), 0),
    'chance': {'hit': np.full(W, 1 / P)},
  }
  score = selection.scores(context, windows, 0)
  for p in config.eval.expand_fractions:
    draws = expanded_chunks(p, C)
    if draws:
      for name, score_WC in score.items():
        rows[f'{name}_p{p:g}'] = row(score_WC, draws)
      rows[f'useful_p{p:g}'] = row(from_end_WC, min(draws, C // P))
  return rows


def one_passage(config: Config) -> tuple[int, int]:
  """Windows of the useful passage; without any passages it is skipped."""
  P, k = config.eval.num_passages, config.model.chunk_size
  chunks = config.stage['mixed'].context_length // k // P if P else 0
  return chunks * k, max(config.eval.output_lengths)


def check_passages(config: Config) -> None:
  """Refuses a number of passages that the context cannot hold."""
  number = config.eval.num_passages
  chunks = config.stage['mixed'].context_length // config.model.chunk_size
  if number == 1 or 0 < chunks < number:
    raise UserError(
      f'config.eval.num_passages is {number}: use 2 or more, one of them '
      f'useful, and no more than the {chunks} chunks of '
      'config.stage.mixed.context_length; 0 skips the eval'
    )


EVAL = Eval(
  run=run,
  title='Which passage to expand',
  table=tables.passages,
  needs=('output_lengths', 'expand_fractions', 'selectors'),
  stage='mixed',
  windows=one_passage,
  check=check_passages,
)
