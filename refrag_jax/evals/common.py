"""What every eval needs: checkpoints by role, batching, tables of STATs.

Which weights answer for which rows (design.md section 4) is data, in ROLES: the
stage whose checkpoint plays the role.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import results, sharding
from refrag_jax.errors import Stopped
from refrag_jax.session import Session

# role: the stage whose checkpoint plays it
ROLES = {
  'before': 'lm',  # the decoder before REFRAG
  'trained': 'mixed_trained',  # the same continued training, uncompressed
  'reconstruct': 'reconstruct',
  'cpt': 'cpt',
  'mixed': 'mixed',
  'policy': 'grpo',  # `mixed`, with the policy trained on it
  'sft': 'sft',
  'sft_full': 'sft_full',
  'sft_none': 'sft_none',
}


class Context(NamedTuple):
  """An eval's surroundings."""

  session: Session
  params: Callable[[str], dict | None]  # of a role; None: no such checkpoint
  datasets: dict[str, Any]  # name -> corpus whose held-out side is measured
  stop: threading.Event

  def available(self, *roles: str) -> bool:
    return all(self.params(role) is not None for role in roles)


def map_batches(context: Context, function, batch: dict, *static) -> np.ndarray:
  """`function(batch, *static)` over all rows, in batches of one shape.

  Args:
    function: jitted; takes the batch's leaves on device, returns (B, ...).
    batch: host arrays (W, ...); the last batch is filled up and cut off again.

  Raises:
    Stopped: asked to stop; evals start over, they keep no state.
  """
  rows = len(batch['doc_B'])
  ways = context.session.mesh.shape['data'] * context.session.mesh.shape['fsdp']
  size = -(-min(context.session.config.eval.batch_size, rows) // ways) * ways
  parts = []
  for first in range(0, rows, size):
    if context.stop.is_set():
      raise Stopped(
        'stopped during the evals; the same command starts them again'
      )
    index = np.minimum(np.arange(first, first + size), rows - 1)
    piece = {key: value[index] for key, value in batch.items()}
    placed = jax.device_put(
      piece, sharding.batch_sharding(context.session.mesh)
    )
    parts.append(function(placed, *static))
  # Fetched at the end, so that the device is not waited for at each batch.
  return np.concatenate([np.asarray(part) for part in parts])[:rows]


def other_document(doc_W: np.ndarray) -> np.ndarray:
  """For each row the index of a row of another document (design: _shuffled).

  A shift by half the rows, then further where it hits the same document; rows
  keep theirs only if there is one document in all.
  """
  rows = len(doc_W)
  index_W = (np.arange(rows) + rows // 2) % rows
  for _ in range(rows):
    same_W = doc_W[index_W] == doc_W
    if not same_W.any():
      break
    index_W = np.where(same_W, (index_W + 1) % rows, index_W)
  return index_W


def prefix_means(nll_WO: np.ndarray, lengths: Iterable[int]) -> dict[str, Any]:
  """Mean over the first n outputs of each window, by 'P<n>'."""
  return {f'P{n}': nll_WO[:, :n].mean(1) for n in lengths}


def table(
  rows: dict[str, dict[str, np.ndarray]],
  doc_W: np.ndarray,
  references: Iterable[str],
  bits_per_nat: float | None = None,
) -> dict[str, Any]:
  """Rows of per-window values to rows of STATs with paired differences.

  Args:
    rows: row -> column -> values (W,).
    doc_W: the unit of standard errors.
    references: rows that every other one is compared with (row minus other).
    bits_per_nat: nats per token to bits per byte of text; None: do not show.
  """
  by_row = {
    name: {
      column: results.by_document(values, doc_W)
      for column, values in columns.items()
    }
    for name, columns in rows.items()
  }
  out = {}
  for name, columns in by_row.items():
    row = {column: results.stat(values) for column, values in columns.items()}
    if bits_per_nat is not None:
      row['bits_per_byte'] = {
        column: stat['mean'] * bits_per_nat for column, stat in row.items()
      }
    row['vs'] = {
      other: {
        column: results.paired(values, by_row[other][column])
        for column, values in columns.items()
        if column in by_row[other]
      }
      for other in references
      if other in by_row and other != name
    }
    out[name] = row
  return out


def bits_per_nat(corpus: Any) -> float:
  """Factor from nats per token to bits per byte, over the held-out text."""
  docs = corpus.documents('heldout')
  tokens = np.diff(corpus.token_offsets)[docs].sum()
  size = np.diff(corpus.text_offsets)[docs].sum()
  return float(tokens / max(1, size) / np.log(2))
