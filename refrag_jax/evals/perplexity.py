"""Log-perplexity of x_{s+1:s+o} given x_{1:s} (paper Tables 1 and 2, Figure 3).

Dimension key: W windows, B batch of them, C chunks, O outputs.

Rows: the decoder before REFRAG and the one with the same continued training,
each with no, the last, or all context, and as an ensemble over its pieces
(REPLUG); REFRAG with everything compressed, with another document's chunks
(what is left of its gain there was not read from the context), and with chunks
expanded by each selector; the baseline CEPE, with another document's pieces as
well.
"""

import numpy as np

from refrag_jax.config.schema import Config, expanded_chunks
from refrag_jax.data.tasks.windows import check_pieces
from refrag_jax.evals import common, replug, selection
from refrag_jax.evals.eval import Eval, continued
from refrag_jax.models.cepe import Cepe
from refrag_jax.models.refrag import Refrag
from refrag_jax.report import tables

PLAIN = {'no_context': 'none', 'full_context': 'full', 'last_k': 'last_k'}
DECODERS = {
  'before': '',
  'trained': '_trained',  # as long as `mixed`
  'cpt_trained': '_cpt_trained',
}
REFRAG = {'mixed': '', 'cpt': '_cpt', 'cpt_frozen': '_frozen'}
CEPE = ('cepe', 'cepe_unfrozen')  # roles, and rows


def measure(context: common.Context, windows: dict) -> dict[str, np.ndarray]:
  """NLL of every output of every window, row -> (W, O)."""
  config, k = context.session.config, context.session.config.model.chunk_size
  rows = {}
  if not context.available('before'):
    rows_before = ', '.join([*PLAIN, 'replug'])
    context.leave_out(f'rows {rows_before}', common.missing('before'))
  for role, suffix in DECODERS.items():
    if context.available(role):
      for row, kind in PLAIN.items():
        rows[row + suffix] = plain_nll(context, role, windows, kind)
      rows[f'replug{suffix}'] = common.apply(context, role, replug.nll, windows)
  shuffled = common.shuffled(windows)
  W, C = windows['chunk_len_BC'].shape
  nobody_WC = np.zeros((W, C))
  for role, suffix in REFRAG.items():
    if context.available(role):
      for which, data in (('', windows), ('_shuffled', shuffled)):
        rows[f'refrag_k{k}{suffix}{which}'] = selection.selected_nll(
          context, role, data, nobody_WC, 0
        )
  if selection.selecting_role(context):
    score = selection.scores(context, windows, 0)
    for p in config.eval.expand_fractions:
      draws = expanded_chunks(p, C)
      if draws:
        by_selector = selection.nll_by_selector(context, windows, draws)
        for name, nll_WO in by_selector.items():
          rows[f'refrag_k{k}_{name}_p{p:g}'] = nll_WO
        # What expansion is worth to a decoder that never met one.
        if context.available('cpt') and 'random' in score:
          rows[f'refrag_k{k}_cpt_random_p{p:g}'] = selection.selected_nll(
            context, 'cpt', windows, score['random'], draws
          )
  for role in CEPE if config.model.piece_length else ():
    if context.available(role):
      for which, data in (('', windows), ('_shuffled', shuffled)):
        rows[role + which] = common.apply(context, role, cepe_nll, data)
  return rows


def plain_nll(
  context: common.Context, role: str, windows: dict, kind: str, rows: int = 0
) -> np.ndarray:
  """NLL of the outputs by the decoder alone, (W, O); `rows` of a batch."""
  return common.apply(
    context, role, Refrag.plain_nll, windows, rows, context=kind
  )


def cepe_nll(model, params, batch):
  """NLL of the outputs by the baseline CEPE, (B, O)."""
  cepe = Cepe(model.cfg)
  return cepe.apply({'params': params}, batch, method=Cepe.output_nll)


def run(context: common.Context) -> dict:
  """The `log_perplexity` table of results.json."""
  config = context.session.config
  k = config.model.chunk_size
  cfg = config.stage['cpt']
  lengths = sorted(config.eval.output_lengths)
  references = [row + suffix for suffix in DECODERS.values() for row in PLAIN]
  references += [
    f'refrag_k{k}{suffix}{which}'
    for suffix in REFRAG.values()
    for which in ('', '_shuffled')
  ]
  references += [
    f'refrag_k{k}_{name}_p{p:g}'
    for name in ('random', 'last')
    for p in config.eval.expand_fractions
  ]
  references += [f'replug{suffix}' for suffix in DECODERS.values()]
  references += [row + which for row in CEPE for which in ('', '_shuffled')]
  out = {}
  for name, corpus in context.datasets.items():
    windows = common.text_windows(context, name, cfg.context_length)
    nll = measure(context, windows)
    out[name] = common.table(
      {row: common.prefix_means(x, lengths) for row, x in nll.items()},
      windows['doc_B'],
      references,
      context.documents_of('log_perplexity', name),
      common.bits_per_nat(corpus),
    )
  return out


def check_contexts(config: Config) -> None:
  check_pieces(config, 'cpt')


EVAL = Eval(
  run=run,
  title='Log-perplexity on held-out documents',
  table=tables.comparison,
  needs=('output_lengths',),
  stage='cpt',
  windows=continued('cpt'),
  check=check_contexts,
)
