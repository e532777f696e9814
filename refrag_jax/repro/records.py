"""What the arms of an ablation left, and their numbers document by document.

An arm's workdir is `<workdir>/seed<S>/<arm>`. A cell 'arm/eval/row/column' is
one column of one of its tables; on a data set it has a value a document, the
mean over that document's windows. Arms are paired by document number, which
means the same document only within one corpus: runs over another text are left
out, and named.

Dimension key:
  N: documents
  C: cells
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from refrag_jax import results
from refrag_jax.errors import UserError
from refrag_jax.runtime import files


class Run(NamedTuple):
  """One arm with one seed."""

  seed: int
  arm: str
  directory: str
  results: dict[str, Any]  # results.json
  saved: dict[str, Any]  # config.json; {}: there is none
  evals: dict[str, Any]  # of documents.json
  datasets: dict[str, str]  # of documents.json: the hash of each one's text

  @property
  def name(self) -> str:
    return f'seed{self.seed}/{self.arm}'

  @property
  def config(self) -> dict[str, Any]:
    """The values of its config; {} where it left none."""
    return self.saved.get('config', {})


class Records(NamedTuple):
  config: str  # name of the config that all runs are arms of; '' without runs
  corpus: str  # hash of the text that all were measured on
  runs: dict[tuple[int, str], Run]  # by seed and arm
  notes: tuple[str, ...]  # a sentence for whatever was left out


def load(workdir: str) -> Records:
  """Reads all runs under a workdir that can be compared with each other.

  `main` of the lowest seed decides on text and config. A run that is not
  finished, is of another text, or is a copy of one that counts already, is
  left out with a sentence in `notes`.
  """
  found, notes = [], []
  for seed, arm, directory in _directories(workdir):
    try:
      found.append(_read(seed, arm, directory, notes))
    except UserError as e:
      notes.append(f'seed{seed}/{arm} is left out: {e}')
  first = next((run for run in found if run.arm == 'main'), None)
  first = first or (found[0] if found else None)
  runs = {}
  for run in found:
    why = next(filter(None, _refusals(run, first, runs)), '')
    if why:
      notes.append(f'{run.name} is left out: {why}')
    else:
      runs[run.seed, run.arm] = run
  if first is None:
    return Records('', '', {}, tuple(notes))
  return Records(
    _config_name(first), first.results.get('corpus', ''), runs, tuple(notes)
  )


def split(cell: str) -> tuple[str, str, str, str]:
  """(arm, eval, row, column) of a cell.

  >>> split('main/log_perplexity/refrag_k8/P16')
  ('main', 'log_perplexity', 'refrag_k8', 'P16')

  Raises:
    UserError: the cell has not these four parts.
  """
  parts = cell.split('/')
  if len(parts) != 4:
    raise UserError(f'a cell is arm/eval/row/column, not {cell!r}')
  return tuple(parts)


def datasets(records: Records, cells: Iterable[str]) -> list[str]:
  """The data sets on which some run has the evals of these cells."""
  names = {}
  for arm, part, _, _ in map(split, cells):
    for run in records.runs.values():
      if run.arm == arm:
        names |= dict.fromkeys(run.evals.get(part, {}))
  return list(names)


def lacking(records: Records, cells: Iterable[str]) -> list[str]:
  """The cells that no run has on any data set."""
  return [
    cell
    for cell in cells
    if not any(
      _values(run, cell, dataset) is not None
      for run in records.runs.values()
      if run.arm == split(cell)[0]
      for dataset in run.evals.get(split(cell)[1], {})
    )
  ]


def by_seed(
  records: Records, cells: Sequence[str], dataset: str
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """The documents that have all these cells, for each seed that has them.

  Returns:
    seed: document numbers (N,), ascending, and their values (N, C). Seeds that
    lack a cell are not in there; a document that one arm lacks drops out.
  """
  out = {}
  for seed in sorted({seed for seed, _ in records.runs}):
    columns = [
      _values(records.runs.get((seed, split(cell)[0])), cell, dataset)
      for cell in cells
    ]
    if any(column is None for column in columns):
      continue
    common = set.intersection(*(set(column) for column in columns))
    doc_N = np.array(sorted(common), np.int64)
    value_NC = np.array(
      [[column[doc] for column in columns] for doc in doc_N.tolist()]
    ).reshape(len(doc_N), len(cells))
    out[seed] = doc_N, value_NC
  return out


def over_seeds(
  of_seed: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
  """Each document's mean over the seeds that have it: it counts once.

  Returns:
    Document numbers (N,), ascending, and values (N, C).
  """
  doc = np.concatenate([doc_N for doc_N, _ in of_seed.values()])
  value = np.concatenate([value_NC for _, value_NC in of_seed.values()])
  doc_N, index = np.unique(doc, return_inverse=True)
  total_NC = np.zeros((len(doc_N), value.shape[1]))
  np.add.at(total_NC, index, value)
  return doc_N, total_NC / np.bincount(index, minlength=len(doc_N))[:, None]


def measured(
  records: Records, weights: Mapping[str, float], dataset: str
) -> dict[str, Any] | None:
  """The STAT of a sum of cells over documents; None where a cell is missing.

  Args:
    weights: cell: factor, such as {'a': 1, 'b': -1} for a paired difference.
  """
  of_seed = by_seed(records, list(weights), dataset)
  if not of_seed:
    return None
  _, value_NC = over_seeds(of_seed)
  return results.stat(value_NC @ np.array(list(weights.values())))


def _directories(workdir: str) -> Iterator[tuple[int, str, str]]:
  """(seed, arm, path), by seed and name."""
  seeds = []
  for name in os.listdir(workdir) if os.path.isdir(workdir) else ():
    match = re.fullmatch(r'seed(\d+)', name)
    if match and os.path.isdir(os.path.join(workdir, name)):
      seeds.append((int(match[1]), name))
  for seed, name in sorted(seeds):
    for arm in sorted(os.listdir(os.path.join(workdir, name))):
      directory = os.path.join(workdir, name, arm)
      if os.path.isdir(directory):
        yield seed, arm, directory


def _read(seed: int, arm: str, directory: str, notes: list[str]) -> Run:
  def read(name: str) -> dict[str, Any]:
    path = os.path.join(directory, name)
    return files.read_json(path) if os.path.exists(path) else {}

  numbers, documents, saved = map(
    read, ('results.json', 'documents.json', 'config.json')
  )
  if not numbers:
    raise UserError('it has no results.json: interrupted, or still running')
  if not documents:
    raise UserError(
      'it has no documents.json, without which nothing can be paired; run its '
      'evals again'
    )
  for key in ('corpus', 'fingerprint'):
    if documents.get(key) != numbers.get(key):
      raise UserError(
        f'results.json and documents.json are of another {key}; run its evals '
        'again'
      )
  texts = documents.get('datasets', {})
  run = Run(seed, arm, directory, numbers, saved, {}, texts)
  return run._replace(evals=_whole(run, documents.get('evals', {}), notes))


def _whole(run: Run, evals: Mapping, notes: list[str]) -> dict[str, Any]:
  """The tables in which each document has one number and one value a cell."""
  out = {}
  for part, of_dataset in evals.items():
    for dataset, table in of_dataset.items():
      doc = table.get('doc', [])
      where = f'{run.name}: {part} on {dataset}'
      if len(set(doc)) < len(doc):
        notes.append(f'{where} is left out: it counts a document twice')
        continue
      rows = {}
      for row, columns in table.get('rows', {}).items():
        for column, values in columns.items():
          if len(values) == len(doc):
            rows.setdefault(row, {})[column] = values
          else:
            notes.append(
              f'{where}, {row}/{column} is left out: {len(values)} values for '
              f'{len(doc)} documents'
            )
      out.setdefault(part, {})[dataset] = {'doc': doc, 'rows': rows}
  return out


def _refusals(run: Run, first: Run, kept: Mapping) -> Iterator[str | bool]:
  """Why a run does not count; False for each check that it passes."""
  own, other = (r.results.get('corpus', '') for r in (run, first))
  yield own != other and (
    f'its text is corpus {own[:12]}, and that of {first.name} is {other[:12]}'
  )
  own, other = _config_name(run), _config_name(first)
  yield own != other and (
    f'it is an arm of the config {own}, and {first.name} of {other}'
  )
  for name in run.datasets.keys() & first.datasets.keys():
    yield run.datasets[name] != first.datasets[name] and (
      f'its data set {name} is another text than that of {first.name}'
    )
  seed = run.config.get('seed', run.seed)
  yield seed != run.seed and f'it was trained with seed {seed}'
  mark = run.results.get('fingerprint')
  twins = (
    r.name for r in kept.values() if r.results.get('fingerprint') == mark
  )
  for twin in twins if mark else ():
    yield f'it is the same run as {twin}, which counts once'


def _config_name(run: Run) -> str:
  """The config's name; that of an arm is `<config>_<arm>`."""
  return run.results.get('config', '').removesuffix(f'_{run.arm}')


def _values(
  run: Run | None, cell: str, dataset: str
) -> dict[int, float] | None:
  """Document number: value, without what is not a number."""
  _, part, row, column = split(cell)
  table = run.evals.get(part, {}).get(dataset) if run else None
  values = table['rows'].get(row, {}).get(column) if table else None
  if values is None:
    return None
  return {
    int(doc): float(value)
    for doc, value in zip(table['doc'], values, strict=True)
    if value is not None and np.isfinite(value)
  }
