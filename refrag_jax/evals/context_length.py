"""More context at the same k, and more than was trained on (paper Table 2).

Dimension key: W windows, C chunks, O outputs.

All lengths s predict the same targets: windows are cut for the longest one, and
a shorter context is the last s tokens of it. Documents that are too short for
the longest drop out of all rows, and `n` counts what is left.

Rows for each s: REFRAG with everything compressed, with another document's
chunks, and the decoder with the same continued training on last-k and, up to
FULL times the trained length, on full context; and that decoder without any.
Where the longest context is more than a decoder has positions for, there is
also what it can read of it: as many last tokens as it holds, by the decoder
before REFRAG and by the one with the same training.
"""

import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.data import batch
from refrag_jax.data.tasks.windows import eval_windows
from refrag_jax.errors import UserError
from refrag_jax.evals import common, perplexity, selection
from refrag_jax.evals.eval import Eval, check_multiples
from refrag_jax.report import tables
from refrag_jax.runtime.progress import say

# Full context costs the square of its length, and by then it is far beyond the
# positions that the decoder was trained on.
FULL = 4


def run(context: common.Context) -> dict:
  """The `context_length` table of results.json."""
  config = context.session.config
  lengths = sorted(config.eval.context_lengths)
  outputs = sorted(config.eval.output_lengths)
  out = {}
  for name, corpus in context.datasets.items() if lengths else ():
    try:
      windows = eval_windows(
        config, corpus, lengths[-1], outputs[-1], config.eval.context_windows
      )
    except UserError as e:  # of several texts one may have short documents
      say(f'eval context_length leaves {name} out: {e}')
      continue
    nll = measure(context, windows)
    if nll:
      out[name] = common.table(
        {row: common.prefix_means(x, outputs) for row, x in nll.items()},
        windows['doc_B'],
        # Each length's controls, and the shortest context as such.
        [row for row in nll if not row.startswith('refrag')]
        + [row for row in nll if row.endswith('_shuffled')]
        + [f'refrag_k{config.model.chunk_size}_s{lengths[0]}'],
        context.documents_of('context_length', name),
        common.bits_per_nat(corpus),
      )
  return out


def measure(context: common.Context, windows: dict) -> dict[str, np.ndarray]:
  """NLL of every output of every window, row -> (W, O)."""
  config, k = context.session.config, context.session.config.model.chunk_size
  role = 'mixed' if context.available('mixed') else 'cpt'
  rows = {}
  if context.available('trained'):
    rows['no_context_trained'] = perplexity.plain_nll(
      context, 'trained', windows, 'none'
    )
  longest = max(config.eval.context_lengths)
  held = held_tokens(config)
  if 0 < held < longest:
    cut = batch.cut_chunks(windows, slice(-(held // k), None))
    size = batch_rows(config, held)
    for plain, suffix in (('before', ''), ('trained', '_trained')):
      if context.available(plain):
        rows[f'last_{held}_tokens{suffix}'] = perplexity.plain_nll(
          context, plain, cut, 'full', size
        )
  for s in sorted(config.eval.context_lengths):
    size = batch_rows(config, s)
    cut = batch.cut_chunks(windows, slice(-(s // k), None))
    W, C = cut['chunk_len_BC'].shape
    if context.available(role):
      for which, data in (('', cut), ('_shuffled', common.shuffled(cut))):
        rows[f'refrag_k{k}_s{s}{which}'] = selection.selected_nll(
          context, role, data, np.zeros((W, C)), 0, rows=size
        )
    if context.available('trained'):
      plain = ['last_k']
      if s <= FULL * config.stage['cpt'].context_length:
        plain.append('full_context')
      for row in plain:
        rows[f'{row}_trained_s{s}'] = perplexity.plain_nll(
          context, 'trained', cut, perplexity.PLAIN[row], size
        )
  return rows


def held_tokens(config: Config) -> int:
  """Context tokens, in whole chunks, that the decoder has positions for."""
  limit, k = config.model.decoder.max_length, config.model.chunk_size
  if not limit:
    return max(config.eval.context_lengths)
  room = limit - 1 - max(config.eval.output_lengths)  # beside BOS and output
  return max(0, room // k * k)


def batch_rows(config, length: int) -> int:
  """Rows of a batch with contexts of `length` tokens.

  As many tokens as the config's batch has at the length that was trained on:
  attention holds rows x length^2 scores, which fit no memory otherwise.
  """
  trained = config.stage['cpt'].context_length
  rows = config.eval.batch_size * trained // length
  return min(config.eval.batch_size, max(1, rows))


def check_lengths(config: Config) -> None:
  check_multiples(config, 'context_lengths')


EVAL = Eval(
  run=run,
  title='More context',
  table=tables.context_length,
  needs=('output_lengths',),
  stage='cpt',
  check=check_lengths,
)
