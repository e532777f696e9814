"""What every eval needs: checkpoints by role, batching, tables of STATs.

Which weights answer for which rows is data, in ROLES: the stage whose
checkpoint plays the role.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import results, sharding
from refrag_jax.data import batch as batch_lib
from refrag_jax.data.tasks import windows as windows_lib
from refrag_jax.errors import Stopped
from refrag_jax.runtime import watchdog
from refrag_jax.runtime.progress import say
from refrag_jax.session import Session

# In eval.data and eval.questions: the held-out side of data.text or of
# data.questions.
HELDOUT = 'heldout'
# role: the stage whose checkpoint plays it
ROLES = {
  'before': 'lm',  # the decoder before REFRAG
  'trained': 'mixed_trained',  # the same continued training, uncompressed
  'cpt_trained': 'cpt_trained',
  'reconstruct': 'reconstruct',
  'reconstruct_unfrozen': 'reconstruct_unfrozen',
  'cpt': 'cpt',
  'cpt_frozen': 'cpt_frozen',
  'mixed': 'mixed',
  'policy': 'grpo',  # `mixed`, with the policy trained on it
  'sft': 'sft',
  'sft_full': 'sft_full',
  'sft_none': 'sft_none',
  'cepe': 'cepe',
  'cepe_unfrozen': 'cepe_unfrozen',
}


class Context(NamedTuple):
  """An eval's surroundings."""

  session: Session
  params: Callable[[str], dict | None]  # of a role; None: no such checkpoint
  datasets: dict[str, Any]  # name -> corpus whose held-out side is measured
  stop: threading.Event
  # eval -> dataset -> {'doc': numbers, 'rows': row -> column -> a value each}:
  # what the STATs are made of, for comparisons with rows of other runs.
  documents: dict[str, Any]
  # What one eval has computed and another one needs as well; see `once`.
  memo: dict[Any, tuple[Any, Any]]
  left_out: list[str]  # what was asked for and cannot be measured, and why

  def documents_of(self, eval_name: str, dataset: str) -> dict[str, Any]:
    of_eval = self.documents.setdefault(eval_name, {})
    return of_eval.setdefault(dataset, {'doc': [], 'rows': {}})

  def leave_out(self, what: str, why: str) -> None:
    """Says, once, what the tables lack of what was asked for."""
    line = f'{what}: left out, {why}'
    if line not in self.left_out:
      self.left_out.append(line)
      say(line)

  def available(self, *roles: str) -> bool:
    return all(self.params(role) is not None for role in roles)


def missing(role: str) -> str:
  """Why a role has no parameters, for people to read."""
  if role == 'before':
    return (
      'there is no decoder before REFRAG: no checkpoint of lm, and the first '
      'stage did not start from an imported one'
    )
  return f'there is no checkpoint of {ROLES[role]}'


def text_windows(context: Context, dataset: str, context_length: int) -> dict:
  """The windows of a data set's text, one dict for all evals."""
  config, corpus = context.session.config, context.datasets[dataset]
  length, num = max(config.eval.output_lengths), config.eval.num_windows
  make = lambda: windows_lib.eval_windows(
    config, corpus, context_length, length, num
  )
  return once(context, corpus, ('windows', context_length), make)


def once(context: Context, of: Any, key: Any, function: Callable) -> Any:
  """`function()`, or what it gave when `of` (the same object) had this key."""
  # The memo holds `of`, so that no other object can get its id.
  entry = context.memo.get((id(of), key))
  if entry is None:
    entry = context.memo[id(of), key] = (of, function())
  return entry[1]


@functools.partial(jax.jit, static_argnames=('function', 'model', 'static'))
def call(params, batch, function: Callable, model: Any, static: tuple):
  """A function of (model, params, batch), or a method of (model, batch).

  Compiled once for all data sets, roles and evals that ask for the same.
  Parameters are arguments: captured, they would be a constant of each program,
  whole on every device, and impossible where processes share them out.
  """
  if getattr(type(model), function.__name__, None) is function:
    return model.apply(
      {'params': params}, batch, method=function, **dict(static)
    )
  return function(model, params, batch, **dict(static))


def apply(
  context: Context,
  role: str,
  function: Callable,
  windows: dict,
  rows: int = 0,
  /,
  **static: Any,
) -> np.ndarray:
  """`function` with the parameters of a role over all windows, as in `call`."""
  run = functools.partial(
    call,
    context.params(role),
    function=function,
    model=context.session.model,
    static=tuple(sorted(static.items())),
  )
  return map_batches(context, run, windows, rows=rows)


def map_batches(
  context: Context, function, batch: dict, *static, rows: int = 0
) -> np.ndarray:
  """`function(batch, *static)` over all rows, in batches of one shape.

  Args:
    function: jitted; takes the batch's leaves on device, returns (B, ...), or
      several such arrays, as is returned here.
    batch: host arrays (W, ...); the last batch is filled up and cut off again.
    rows: of a batch; 0 takes the config's.

  Raises:
    Stopped: asked to stop; the eval under way starts over, it keeps no state.
  """
  mesh = context.session.mesh
  vote = once(context, context.stop, 'vote', lambda: sharding.Vote(mesh))
  total = len(batch['doc_B'])
  ways = sharding.axis_size('batch', mesh)
  rows = min(rows or context.session.config.eval.batch_size, total)
  size = -(-rows // ways) * ways
  parts = []
  for first in range(0, total, size):
    if any(vote(context.stop.is_set())):
      raise Stopped(
        'stopped during the evals; the same command starts them again'
      )
    watchdog.phase(f'evals, rows {first} to {first + size} of {total}')
    index = np.minimum(np.arange(first, first + size), total - 1)
    placed = jax.device_put(
      batch_lib.take(batch, index), sharding.batch_sharding(mesh)
    )
    parts.append(function(placed, *static))
  # Fetched at the end, so that the device is not waited for at each batch.
  whole = lambda *of: np.concatenate([sharding.fetch(x) for x in of])[:total]
  return jax.tree.map(whole, *parts)


def other_document(doc_W: np.ndarray) -> np.ndarray:
  """For each row (W,) the index of one of another document: `_shuffled`.

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


def shuffled(windows: dict) -> dict:
  """The windows, each with the context of another document's."""
  other_W = other_document(windows['doc_B'])
  return batch_lib.with_contexts_of(windows, other_W)


def prefix_means(nll_WO: np.ndarray, lengths: Iterable[int]) -> dict[str, Any]:
  """Mean over the first n outputs of each window, by 'P<n>'."""
  return {f'P{n}': nll_WO[:, :n].mean(1) for n in lengths}


def table(
  rows: dict[str, dict[str, np.ndarray]],
  doc_W: np.ndarray,
  references: Iterable[str],
  documents: dict[str, Any],
  bits_per_nat: float | None = None,
) -> dict[str, Any]:
  """Rows of per-window values to rows of STATs with paired differences.

  Args:
    rows: row -> column -> values (W,).
    doc_W: the unit of standard errors.
    references: rows that every other one is compared with (row minus other).
    documents: takes the document means, as in `Context`.
    bits_per_nat: nats per token to bits per byte of text; None: do not show.
  """
  by_row = {
    name: {
      column: results.by_document(values, doc_W)
      for column, values in columns.items()
    }
    for name, columns in rows.items()
  }
  documents['doc'] = np.unique(doc_W)
  documents['rows'] |= by_row
  out = {}
  for name, columns in by_row.items():
    row = {column: results.stat(values) for column, values in columns.items()}
    if bits_per_nat is not None:
      row['bits_per_byte'] = {
        column: None if stat['mean'] is None else stat['mean'] * bits_per_nat
        for column, stat in row.items()
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
