"""What the names on a report mean: rows, columns, signs; those that occur."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from refrag_jax.report import page

# (what a row's name holds, how it is written on the page, what it means)
NAMES = (
  (r'^no_context', 'no_context', 'the decoder alone, which reads no context'),
  (r'^last_k', 'last_k', 'the decoder alone, with as many last tokens of the '
   'context as REFRAG has chunk embeddings'),
  (r'^full_context', 'full_context', 'the decoder alone, with the whole '
   'context as tokens'),
  (r'^replug', 'replug', 'the decoder alone, an ensemble over pieces of the '
   'context (REPLUG)'),
  (r'^refrag_k\d+', 'refrag_k and a number', 'REFRAG with chunks of so many '
   'tokens, all of them compressed'),
  (r'^last(_\d+)?_tokens', 'last_tokens', 'the decoder alone, with the last '
   'tokens of the context: as many as REFRAG has chunks, or that many'),
  (r'^(gold_distractors|given)', 'gold_distractors, given', 'REFRAG, with the '
   'passage that has the answer among others; or, where none is marked, with '
   'those that the question brings'),
  (r'^gold$', 'gold', 'REFRAG, with the passage that has the answer alone'),
  (r'gold_missing', 'gold_missing', 'with the other passages alone'),
  (r'^bm25', 'bm25', 'REFRAG, with the passages that share most with the '
   'question (BM25)'),
  (r'^no_passage', 'no_passage', 'REFRAG without any'),
  (r'_twin', '_twin', 'the decoder fine-tuned alike, without compression'),
  (r'_of_\d+$', '_of_ and a number', 'with so many passages'),
  (r'^cepe', 'cepe', 'the baseline CEPE, which reads the context by '
   'cross-attention'),
  (r'_rl_p|^rl', 'rl', 'chunks chosen by the policy'),
  (r'random', 'random', 'chunks chosen at random'),
  (r'_last_p|^last_p', 'last', 'the last chunks before the output'),
  (r'ppl_desc|ppl_asc', 'ppl_desc, ppl_asc', 'the chunks that the decoder '
   'finds hardest, or easiest, to predict'),
  (r'oracle', 'oracle', 'the chunks that lower the loss most when expanded '
   'alone: it knows the output'),
  (r'_shuffled', '_shuffled', "with another document's chunks: what is gained "
   'there was not read from the context'),
  (r'(?<!cpt)_trained', '_trained', 'with the same further training as REFRAG, '
   'but without compression'),
  (r'_cpt_trained', '_cpt_trained', 'likewise, with as much as `cpt` alone'),
  (r'_frozen', '_frozen', 'the decoder frozen while encoder and projection '
   'were trained'),
  (r'_unfrozen', '_unfrozen', 'the decoder trained along'),
  (r'_cpt$', '_cpt', 'REFRAG before it met expanded chunks'),
)  # fmt: skip
SIGNS = (
  ('P and a number', 'the mean over so many first tokens of the output'),
  ('±', 'one standard error over documents; n is their number'),
  ('k', 'tokens in a chunk'),
  ('p and a number', 'the share of chunks that stay tokens'),
  ('rate', 'how many times shorter the context is for the decoder'),
)


def glossary(evals: Mapping[str, Any]) -> str:
  """A list of the names that these tables hold, folded away."""
  rows = set(_rows(evals))
  known = [
    (shown, meaning)
    for pattern, shown, meaning in NAMES
    if any(re.search(pattern, row) for row in rows)
  ]
  if not known:
    return ''
  items = ''.join(
    f'<dt>{page.name(shown)}</dt><dd>{page.text(meaning)}</dd>'
    for shown, meaning in [*known, *SIGNS]
  )
  return page.details('What the names mean', f'<dl>{items}</dl>')


def _rows(evals: Mapping[str, Any]) -> Iterable[str]:
  for datasets in evals.values():
    for rows in datasets.values():
      if isinstance(rows, Mapping):
        yield from rows
      else:  # `selection` is a list of rows
        yield from (row['selector'] for row in rows)
