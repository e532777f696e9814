"""Copying: does the decoder find its next token further back in its input?

Dimension key: W spans, B batch of them, S tokens of a span, O = 2 S outputs.

A frozen decoder can regenerate a text from its context only if it copies, and
a small one does not learn that from text by itself (configs/tiny.py). Here it
reads [BOS, span, span], the span being tokens of one document in random order:
the first copy can hardly be predicted, the second one by copying alone.

Rows: the first and the second copy, under the decoder before REFRAG and under
the one with the same continued training. Columns P<n>: spans of n tokens.
"""

import functools

import numpy as np

from refrag_jax.data import batch, windows
from refrag_jax.evals import common, perplexity
from refrag_jax.evals.eval import Eval
from refrag_jax.report import tables

DECODERS = {'before': '', 'trained': '_trained'}


def run(context: common.Context) -> dict:
  """The `copying` table of results.json."""
  config = context.session.config
  roles = [role for role in DECODERS if context.available(role)]
  out = {}
  for name, corpus in context.datasets.items() if roles else ():
    longest = max(config.eval.copy_lengths)
    doc_W, span_WS = spans(corpus, longest, config.eval.num_windows)
    batch_of = functools.partial(
      twice, doc_W, bos_id=context.session.tokenizer.bos_id
    )
    rows = {}
    for role in roles:
      first = rows.setdefault('first' + DECODERS[role], {})
      second = rows.setdefault('second' + DECODERS[role], {})
      for n in config.eval.copy_lengths:
        nll_WO = perplexity.plain_nll(
          context, role, batch_of(span_WS[:, :n]), 'none'
        )
        first[f'P{n}'] = nll_WO[:, :n].mean(1)
        second[f'P{n}'] = nll_WO[:, n:].mean(1)
    out[name] = common.table(
      rows,
      doc_W,
      ('first', 'first_trained'),
      context.documents_of('copying', name),
    )
  return out


def spans(
  corpus, length: int, num: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens from all over a document, in random order: doc_W, int32 span_WS.

  From all held-out documents in turn that have `length` tokens; fewer than
  `num` if they hold no more. No token is drawn twice for a span.
  """
  docs = corpus.documents('heldout')
  table = windows.windows(corpus, docs, 0, length, 'held-out documents')
  n_W = windows.spread(table, num, seed)
  doc_W, _ = windows.locate(table, n_W)
  first_W, end_W = corpus.token_offsets[doc_W], corpus.token_offsets[doc_W + 1]
  span_WS = np.empty((len(n_W), length), np.int32)
  for w, n in enumerate(n_W):
    rng = np.random.Generator(np.random.Philox(key=[seed, n]))
    drawn_S = rng.choice(end_W[w] - first_W[w], length, replace=False)
    span_WS[w] = corpus.tokens[first_W[w] + drawn_S]
  return doc_W, span_WS


def twice(doc_W: np.ndarray, span_WS: np.ndarray, bos_id: int) -> dict:
  """[BOS, span, span] in the batch format, without a chunk."""
  bos_W1 = np.full((len(doc_W), 1), bos_id)
  twice_WO = np.concatenate([span_WS, span_WS], axis=1)
  return batch.plain(bos_W1, twice_WO, doc_W) | batch.no_chunks(len(doc_W), 1)


EVAL = Eval(
  run=run,
  title='Copying',
  table=tables.copying,
  needs=('copy_lengths',),
  windows=lambda config: (0, max(config.eval.copy_lengths)),
)
