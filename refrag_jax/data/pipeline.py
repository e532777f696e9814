"""The reader: a stage's batches one after the other, made ahead of the step.

There is no iterator state to save: batches are a pure function of (seed, step),
so a run that resumes at step n asks for step n, and each process asks for its
own rows of it.
"""

from collections.abc import Iterator

import grain
import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.data import tokenizers
from refrag_jax.data.batch import Batch
from refrag_jax.data.tasks.task import Sampler
from refrag_jax.data.text import corpus as corpus_lib


def prepare_corpus(config: Config, cache_dir: str) -> corpus_lib.Corpus:
  """Returns the index of the run's own text."""
  return corpus_lib.prepare(
    config.data.text,
    config.data.weights,
    tokenizers.load(config.data.tokenizer),
    config.data.cache_dir or cache_dir,
    config.data.heldout_fraction,
  )


def batches(
  sample: Sampler, rows: np.ndarray, start_step: int, num_steps: int
) -> Iterator[tuple[int, Batch]]:
  """Yields (step, rows of its batch) from `start_step` to the last step.

  Read ahead by grain in two threads: numpy and the tokenizers let go of the
  interpreter lock, and worker processes would need flags parsed and memory of
  their own.

  Args:
    rows: which of a batch's rows.
  """
  source = _Steps(sample, rows, num_steps)
  steps = grain.MapDataset.source(source).slice(slice(start_step, None))
  return iter(
    steps.to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )
  )


class _Steps:
  """A random-access source for grain: item `step` is that step's batch."""

  def __init__(self, sample: Sampler, rows: np.ndarray, num_steps: int):
    self._sample, self._rows, self._num_steps = sample, rows, num_steps

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> tuple[int, Batch]:
    return step, self._sample(step, self._rows)
