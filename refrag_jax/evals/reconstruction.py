"""Reconstruction: text regenerated from its own chunk embeddings (Table 11).

P<n>: n tokens from the n / k embeddings of those tokens, teacher-forced,
through the frozen decoder, or one that was trained along. The rows beside it:
another document's embeddings, and none at all.
"""

from refrag_jax.data import batch
from refrag_jax.data.tasks.windows import reconstruction_windows
from refrag_jax.evals import common, perplexity
from refrag_jax.evals.eval import Eval, check_regenerated, regenerated
from refrag_jax.models.refrag import Refrag
from refrag_jax.report import tables

# role: ending of its rows' names
REFRAG = {'reconstruct': '', 'reconstruct_unfrozen': '_unfrozen'}


def run(context: common.Context) -> dict:
  """The `reconstruction` table of results.json."""
  config = context.session.config
  roles = [role for role in REFRAG if context.available(role)]
  out = {}
  for name, corpus in context.datasets.items() if roles else ():
    # The same windows for every n, cut to their first n tokens.
    windows = reconstruction_windows(
      config,
      corpus,
      max(config.eval.reconstruct_lengths),
      config.eval.num_windows,
    )
    out[name] = {}
    for role in roles:
      rows = measure(context, role, windows)
      out[name] |= common.table(
        rows,
        windows['doc_B'],
        list(rows)[1:],
        context.documents_of('reconstruction', name),
        common.bits_per_nat(corpus),
      )
  return out


def measure(context: common.Context, role: str, windows: dict) -> dict:
  """NLL per window of one role's three rows, by row and column."""
  k, ending = context.session.config.model.chunk_size, REFRAG[role]
  own = f'refrag_k{k}{ending}'
  compressed = lambda windows: common.apply(
    context, role, Refrag.compressed_nll, windows
  )
  rows = {own: {}, f'{own}_shuffled': {}, f'no_context{ending}': {}}
  for n in context.session.config.eval.reconstruct_lengths:
    # n tokens of output and the n / k chunks that hold them
    cut = batch.cut_outputs(batch.cut_chunks(windows, slice(n // k)), n)
    nll = (
      compressed(cut),
      compressed(common.shuffled(cut)),
      perplexity.plain_nll(context, role, cut, 'none'),
    )
    for row, nll_WO in zip(rows, nll, strict=True):
      rows[row][f'P{n}'] = nll_WO.mean(1)
  return rows


EVAL = Eval(
  run=run,
  title='Reconstruction',
  table=tables.comparison,
  needs=('reconstruct_lengths',),
  windows=regenerated,
  check=check_regenerated,
)
