"""Log-perplexity of x_{s+1:s+o} given x_{1:s} (paper Tables 1 and 2, Figure 3).

Dimension key: W windows, B batch of them, C chunks, O outputs.

Rows: the decoder before REFRAG and the one with the same continued training,
each with no, the last, or all context; REFRAG with everything compressed, with
another document's chunks (what is left of its gain there was not read from the
context), and with chunks expanded by each selector.
"""

import functools

import jax
import numpy as np

from refrag_jax import forward
from refrag_jax.config import expanded_chunks
from refrag_jax.data import pipeline
from refrag_jax.evals import common, selection

PLAIN = {'no_context': 'none', 'full_context': 'full', 'last_k': 'last_k'}


def measure(context: common.Context, windows: dict) -> dict[str, np.ndarray]:
  """NLL of every output of every window, row -> (W, O)."""
  config, k = context.session.config, context.session.config.model.chunk_size
  model = context.session.model
  rows = {}
  for role, suffix in (('before', ''), ('trained', '_trained')):
    if context.available(role):
      params = context.params(role)
      for row, kind in PLAIN.items():
        rows[row + suffix] = common.map_batches(
          context, functools.partial(_plain(model, kind), params), windows
        )
  other_W = common.other_document(windows['doc_B'])
  chunk_keys = ('chunks_BCK', 'chunk_len_BC', 'encoder_BCM', 'encoder_len_BC')
  shuffled = windows | {key: windows[key][other_W] for key in chunk_keys}
  W, C = windows['chunk_len_BC'].shape
  nobody_WC = np.zeros((W, C))
  for role, suffix in (('mixed', ''), ('cpt', '_cpt')):
    if context.available(role):
      for which, data in (('', windows), ('_shuffled', shuffled)):
        rows[f'refrag_k{k}{suffix}{which}'] = selection.selected_nll(
          context, role, data, nobody_WC, 0
        )
  if context.available('mixed'):
    role = 'policy' if context.available('policy') else 'mixed'
    score = selection.scores(context, windows, 0)
    for p in config.eval.expand_fractions:
      draws = expanded_chunks(p, C)
      if draws:
        for name, score_WC in score.items():
          rows[f'refrag_k{k}_{name}_p{p:g}'] = selection.selected_nll(
            context, role, windows, score_WC, draws
          )
  return rows


@functools.lru_cache(maxsize=8)
def _plain(model, kind: str):
  return jax.jit(
    lambda params, batch: forward.plain_nll(model, params, batch, kind)
  )


def run(context: common.Context) -> dict:
  """The `log_perplexity` table of results.json."""
  config = context.session.config
  k = config.model.chunk_size
  cfg = config.stage['cpt']
  lengths = sorted(config.eval.output_lengths)
  references = [
    row + suffix for suffix in ('', '_trained') for row in PLAIN
  ] + [f'refrag_k{k}', f'refrag_k{k}_shuffled']
  references += [
    f'refrag_k{k}_{name}_p{p:g}'
    for name in ('random', 'last')
    for p in config.eval.expand_fractions
  ]
  out = {}
  for name, corpus in context.datasets.items():
    windows = pipeline.eval_windows(
      config, corpus, cfg.context_length, lengths[-1], config.eval.num_windows
    )
    nll = measure(context, windows)
    out[name] = common.table(
      {row: common.prefix_means(x, lengths) for row, x in nll.items()},
      windows['doc_B'],
      references,
      common.bits_per_nat(corpus),
    )
  return out
