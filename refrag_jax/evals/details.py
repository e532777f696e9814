"""Where in the output, from how far, and of what compression keeps the text.

Dimension key: W windows or spans, B batch of them, C chunks, O outputs, S
tokens of a span, D decoder width, V vocabulary.

Three questions that the paper's tables leave open:

  how long   columns o1..oO, the NLL of each output alone, for REFRAG, the same
             with another document's chunks, and the decoder with the same
             continued training without context; `vs` has the gains
  how far    row `expand_one_gain`, columns d1..dL: what expanding the chunk at
             distance d from the output (d1 stands directly before it) lowers
             the NLL, all others compressed
  of what    rows <digits|identifiers>_P<n>_<compressed|expanded|shuffled>,
             column `exact`: n tokens of text are regenerated from what stands
             before them (teacher-forced, as in `reconstruct`, whose weights
             these are), around one number or identifier; the share of these
             whose tokens are all the most probable ones. Before the text stand
             its own chunk vectors, its own tokens, or another document's
             vectors. `expanded` has the answer in front of it, so its shortfall
             from 1 is a failure of this decoder to copy, not of the vectors.

`n` of the last rows is the number of documents that have such spans.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from refrag_jax.data import windows as windows_lib
from refrag_jax.data.tasks.windows import reconstructions_at
from refrag_jax.evals import common, perplexity, selection
from refrag_jax.evals.eval import Eval, check_regenerated, continued
from refrag_jax.models.layers import einsum32
from refrag_jax.models.refrag import Refrag
from refrag_jax.report import tables

# Of bytes: their offsets are those of corpus.starts. A word with an underscore
# beside a letter, or with a capital after a small letter, is an identifier.
SPANS = {
  'digits': re.compile(rb'\d{3,}'),
  'identifiers': re.compile(
    rb'\b(?=\w*(?:[A-Za-z]_|_[A-Za-z]|[a-z][A-Z]))[A-Za-z_]\w*'
  ),
}


class Spans(NamedTuple):
  doc: np.ndarray  # int64[W], ascending
  first: np.ndarray  # int64[W], first token, in the document
  size: np.ndarray  # int64[W], tokens


def run(context: common.Context) -> dict:
  """The `details` table of results.json."""
  out = {}
  for name, corpus in context.datasets.items():
    rows = by_position(context, name)
    if context.available('reconstruct'):
      for kind, pattern in SPANS.items():
        spans = find(corpus, corpus.documents('heldout'), pattern)
        for n in context.session.config.eval.reconstruct_lengths:
          rows |= exact(context, name, corpus, kind, spans, n)
    if rows:
      out[name] = rows
  return out


def by_position(context: common.Context, name: str) -> dict:
  """Rows by place of the output and by distance of the expanded chunk."""
  config, k = context.session.config, context.session.config.model.chunk_size
  selecting = selection.selecting_role(context)
  role = selecting or 'cpt'
  if not context.available(role):
    return {}
  windows = common.text_windows(
    context, name, config.stage['cpt'].context_length
  )
  W, C = windows['chunk_len_BC'].shape
  nll = {
    f'refrag_k{k}{which}': selection.selected_nll(
      context, role, data, np.zeros((W, C)), 0
    )
    for which, data in (
      ('', windows),
      ('_shuffled', common.shuffled(windows)),
    )
  }
  none_W = nll[f'refrag_k{k}'].mean(1)
  if context.available('trained'):
    nll['no_context_trained'] = perplexity.plain_nll(
      context, 'trained', windows, 'none'
    )
  rows = {
    row: {f'o{i + 1}': nll_WO[:, i] for i in range(nll_WO.shape[1])}
    for row, nll_WO in nll.items()
  }
  if selecting:  # `cpt` has never met an expanded chunk
    gain_WC = selection.oracle(context, windows, 0) + none_W[:, None]
    rows['expand_one_gain'] = {
      f'd{d + 1}': gain_WC[:, C - 1 - d] for d in range(C)
    }
  return common.table(
    rows,
    windows['doc_B'],
    ('no_context_trained', f'refrag_k{k}_shuffled'),
    context.documents_of('details', name),
  )


def exact(
  context: common.Context, name: str, corpus, kind: str, spans: Spans, n: int
) -> dict:
  """Rows of exactly regenerated spans in windows of n tokens."""
  config = context.session.config
  chosen, start_W = around(corpus, spans, n, config.eval.num_windows)
  if not len(start_W):
    return {}
  windows = reconstructions_at(config, corpus, chosen.doc, start_W, n)
  # Few shapes, so few programs; a shorter span repeats its last token.
  S = 1 << (int(chosen.size.max()) - 1).bit_length()
  windows['place_BS'] = (chosen.first - start_W)[:, None] + np.minimum(
    np.arange(S), chosen.size[:, None] - 1
  )
  rows = {}
  for which, data, expanded in (
    ('compressed', windows, False),
    ('expanded', windows, True),
    ('shuffled', common.shuffled(windows), False),
  ):
    values_W = common.apply(
      context, 'reconstruct', exactly, data, expanded=expanded
    )
    rows[f'{kind}_P{n}_{which}'] = {'exact': values_W.astype(np.float64)}
  return common.table(
    rows,
    chosen.doc,
    [f'{kind}_P{n}_{which}' for which in ('expanded', 'shuffled')],
    # Other documents than above: their means are kept apart.
    context.documents_of(f'details_{kind}_P{n}', name),
  )


def find(corpus, docs: np.ndarray, pattern: re.Pattern) -> Spans:
  """All matches in the documents of these numbers, as the tokens touched."""
  doc, first, size = [], [], []
  for d in docs:
    text = corpus.text[slice(*corpus.text_offsets[d : d + 2])].tobytes()
    span_N2 = np.array([m.span() for m in pattern.finditer(text)], np.int64)
    if not len(span_N2):
      continue
    starts = corpus.starts[slice(*corpus.token_offsets[d : d + 2])]
    begin_N = np.searchsorted(starts, span_N2[:, 0], side='right') - 1
    end_N = np.searchsorted(starts, span_N2[:, 1], side='left')
    doc.append(np.full(len(span_N2), d))
    first.append(begin_N)
    size.append(end_N - begin_N)
  joined = [np.concatenate(x) if x else np.zeros(0, int) for x in
            (doc, first, size)]  # fmt: skip
  return Spans(*joined)


def around(
  corpus, spans: Spans, length: int, num: int
) -> tuple[Spans, np.ndarray]:
  """Chooses spans, and windows of `length` tokens that hold one each whole.

  From as many documents as possible, by turns; a span stands anywhere in its
  window. Fewer than `num` if the documents hold no more.

  Returns:
    The spans, and int64[W], the first token of each one's window in its
    document.
  """
  total_W = np.diff(corpus.token_offsets)[spans.doc]
  fits_W = (spans.size <= length) & (total_W >= length)
  spans, total_W = Spans(*(x[fits_W] for x in spans)), total_W[fits_W]
  docs, count = np.unique(spans.doc, return_counts=True)
  bounds = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
  table = windows_lib.Windows(0, length, docs, bounds, 0)
  n_W = np.sort(windows_lib.spread(table, num, 0)) if len(docs) else bounds[:0]
  spans, total_W = Spans(*(x[n_W] for x in spans)), total_W[n_W]
  earliest_W = np.maximum(0, spans.first + spans.size - length)
  latest_W = np.minimum(spans.first, total_W - length)
  room_W = (latest_W - earliest_W + 1).astype(np.uint64)
  drawn_W = windows_lib.mix(length, spans.doc, spans.first) % room_W
  return spans, earliest_W + drawn_W.astype(np.int64)


def exactly(model, params, batch, expanded: bool):
  """Whether all tokens at place_BS are the most probable ones, bool (B,)."""
  B, C, _ = batch['chunks_BCK'].shape
  variables = {'params': params}
  c_BCE = None
  if not expanded:
    c_BCE = model.apply(variables, batch, method=Refrag.chunk_embeddings)
  hidden_BOD = model.apply(
    variables,
    batch,
    c_BCE,
    jnp.full((B, C), expanded),
    C if expanded else 0,
    method=Refrag.output_states,
  )
  place_BS = batch['place_BS']
  hidden_BSD = jnp.take_along_axis(hidden_BOD, place_BS[..., None], 1)
  head_DV = model.apply(variables, method=Refrag.head)
  logits_BSV = einsum32(
    'BSD,DV->BSV', hidden_BSD, head_DV.astype(hidden_BSD.dtype)
  )
  token_BS = jnp.take_along_axis(batch['output_BO'], place_BS, 1)
  return (logits_BSV.argmax(-1) == token_BS).all(1)


EVAL = Eval(
  run=run,
  title='Where, how far, and of what',
  table=tables.details,
  needs=('output_lengths', 'reconstruct_lengths'),
  stage='cpt',
  windows=continued('cpt'),
  check=check_regenerated,
)
