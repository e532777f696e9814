"""Regeneration: what is written, greedily, from chunk embeddings alone.

Not in the paper, which measures the NLL (`reconstruction`): a token that is
wrong there is put right before the next one, here it is not. Columns, of the
longest of `eval.reconstruct_lengths`:

  share       of the source's tokens that were written, wherever they stand
  same_place  of the source's tokens that were written where they stand

Row `_shuffled` writes from another document's embeddings, and is held against
the same source: as much comes of common words. `texts` has the first few.

Dimension key: W windows, C chunks, N tokens of a source.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from refrag_jax import forward, generate
from refrag_jax.data import pipeline
from refrag_jax.evals import common, reconstruction

NUM_TEXTS = 12


def run(context: common.Context) -> dict:
  """The `regeneration` table of results.json."""
  config, decode = context.session.config, context.session.tokenizer.decode
  length = max(config.eval.reconstruct_lengths)
  roles = [role for role in reconstruction.REFRAG if context.available(role)]
  out = {}
  for name, corpus in context.datasets.items() if roles else ():
    windows = pipeline.reconstruction_windows(
      config, corpus, length, config.eval.num_windows
    )
    source_WN = windows['output_BO']
    other_W = common.other_document(windows['doc_B'])
    others = {
      key: windows[key][other_W] for key in ('encoder_BCM', 'encoder_len_BC')
    }
    out[name], texts = {}, []
    for role in roles:
      rows = {}
      row = f'refrag_k{config.model.chunk_size}{reconstruction.REFRAG[role]}'
      write = writer(context, role, length)
      for label, batch in (
        (row, windows),
        (f'{row}_shuffled', windows | others),
      ):
        ids_WN = common.map_batches(context, write, batch)
        rows[label] = {
          'share': shared(ids_WN, source_WN),
          'same_place': (ids_WN == source_WN).mean(1),
        }
        if label == row:
          texts += [
            {
              'row': row,
              'source': decode(source.tolist()),
              'written': decode(ids.tolist()),
            }
            for source, ids in zip(
              source_WN[:NUM_TEXTS], ids_WN[:NUM_TEXTS], strict=True
            )
          ]
      out[name] |= common.table(
        rows,
        windows['doc_B'],
        (f'{row}_shuffled',),
        context.documents_of('regeneration', name),
      )
    out[name]['texts'] = texts
  return out


def writer(context: common.Context, role: str, length: int):
  """The compiled function from a batch to the ids written, (B, length)."""
  model, eos_id = context.session.model, context.session.tokenizer.eos_id

  @jax.jit
  def write(params, batch):
    c_BCE = forward.chunk_vectors(model, params, batch)
    e_BCD = model.apply({'params': params}, c_BCE, method='project')
    nothing = batch | {
      'output_BO': batch['output_BO'][:, :0],
      'output_len_B': jnp.zeros_like(batch['output_len_B']),
    }
    expand_BC = jnp.zeros(c_BCE.shape[:2], bool)
    return generate.greedy(
      model, params, nothing, e_BCD, expand_BC, 0, length, eos_id
    )

  return functools.partial(write, context.params(role))


def shared(ids_WN: np.ndarray, source_WN: np.ndarray) -> np.ndarray:
  """Share of a source's tokens among those written, as multisets, (W,)."""
  return np.array([
    (Counter(ids.tolist()) & Counter(source.tolist())).total() / len(source)
    for ids, source in zip(ids_WN, source_WN, strict=True)
  ])  # fmt: skip
