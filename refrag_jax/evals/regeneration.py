"""Regeneration: what is written, greedily, from chunk embeddings alone.

Not in the paper, which measures the NLL (`reconstruction`): a token that is
wrong there is put right before the next one, here it is not. Columns, of the
longest of `eval.reconstruct_lengths`:

  share       of the source's tokens that were written, wherever they stand
  same_place  of the source's tokens that were written where they stand

Row `_shuffled` writes from another document's embeddings, and is held against
the same source: as much comes of common words. `texts` has the first few.

Dimension key: W windows, N tokens of a source.
"""

from collections import Counter

import numpy as np

from refrag_jax.data.tasks.windows import reconstruction_windows
from refrag_jax.evals import common, qa, reconstruction
from refrag_jax.evals.eval import Eval, check_regenerated, regenerated
from refrag_jax.report import tables

NUM_TEXTS = 12


def run(context: common.Context) -> dict:
  """The `regeneration` table of results.json."""
  config, decode = context.session.config, context.session.tokenizer.decode
  roles = [role for role in reconstruction.REFRAG if context.available(role)]
  out = {}
  for name, corpus in context.datasets.items() if roles else ():
    windows = reconstruction_windows(
      config,
      corpus,
      max(config.eval.reconstruct_lengths),
      config.eval.num_windows,
    )
    source_WN = windows['output_BO']
    out[name], texts = {}, []
    for role in roles:
      own = f'refrag_k{config.model.chunk_size}{reconstruction.REFRAG[role]}'
      ids = {
        own: qa.written(context, role, windows, 'chunks', 0),
        f'{own}_shuffled': qa.written(
          context, role, common.shuffled(windows), 'chunks', 0
        ),
      }
      out[name] |= common.table(
        {row: compare(ids_WN, source_WN) for row, ids_WN in ids.items()},
        windows['doc_B'],
        (f'{own}_shuffled',),
        context.documents_of('regeneration', name),
      )
      texts += [
        {'row': own, 'source': decode(source), 'written': decode(wrote)}
        for source, wrote in zip(
          source_WN[:NUM_TEXTS].tolist(),
          ids[own][:NUM_TEXTS].tolist(),
          strict=True,
        )
      ]
    out[name]['texts'] = texts
  return out


def compare(ids_WN: np.ndarray, source_WN: np.ndarray) -> dict:
  """Shares of each source's tokens that were written, column -> (W,)."""
  both_W = [
    (Counter(ids) & Counter(source)).total()
    for ids, source in zip(ids_WN.tolist(), source_WN.tolist(), strict=True)
  ]
  return {
    'share': np.array(both_W) / source_WN.shape[1],
    'same_place': (ids_WN == source_WN).mean(1),
  }


EVAL = Eval(
  run=run,
  title='What is written from chunks alone',
  table=tables.regeneration,
  needs=('reconstruct_lengths',),
  windows=regenerated,
  check=check_regenerated,
)
