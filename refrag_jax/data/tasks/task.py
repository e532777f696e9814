"""What a stage reads: the interface of every task.

A task turns the run's text, or its questions, into batches. The batch of a step
is a pure function of (seed, step, rows), so that a run that resumes at step n
asks for step n, and each process for its own rows of it.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.data.batch import Batch
from refrag_jax.data.text.corpus import Corpus

# (step, row numbers) -> those rows of that step's batch.
Sampler = Callable[[int, np.ndarray], Batch]
Shapes = dict[str, tuple[tuple[int, ...], type]]  # field: a row's shape, dtype


def stream_seed(config: Config, stream: str) -> int:
  """The seed of a stream of samples; equal names draw equal samples."""
  name = f'{config.seed} {stream}'.encode()
  return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), 'little')


class Task:
  """Everywhere `name` is the stage's, for its section config.stage[name]."""

  reads = 'text'  # or 'questions'
  regenerates = False  # whether the output is the context itself

  def check(self, config: Config, name: str) -> None:
    """Refuses a config whose batches cannot be made.

    Raises:
      UserError: in one line, what to change.
    """

  def check_text(self, config: Config, name: str, corpus: Corpus) -> None:
    """Refuses text that no sample can be made of, before any is trained.

    Raises:
      UserError: all documents of one side, or of a source, are too short.
    """

  def settings(self, config: Config) -> dict[str, Any]:
    """What of config.data must not change under a stage that is resumed."""
    return {'max_encoder_tokens': config.data.max_encoder_tokens}

  def window_length(self, config: Config, name: str) -> int:
    """Tokens of text that a sample needs in a line; 0: it takes any text."""
    del config, name
    return 0

  def passes(self, config: Config, name: str, corpus: Corpus) -> float:
    """How often the stage reads the source of text that it reads most often.

    0 where that is not known.
    """
    del config, name, corpus
    return 0.0

  def num_chunks(self, config: Config, name: str) -> int:
    """The most chunks that a context has; 0: there is no context."""
    raise NotImplementedError

  def chunks_of_steps(self, config: Config, name: str, seed: int) -> np.ndarray:
    """The number of chunks of every step, int (num_train_steps,)."""
    del seed
    steps = config.stage[name].num_train_steps
    return np.full(steps, self.num_chunks(config, name))

  def row_shapes(self, config: Config, name: str, num_chunks: int) -> Shapes:
    """What `sampler` gives at a step with so many chunks, without any text."""
    raise NotImplementedError

  def sampler(
    self, config: Config, name: str, seed: int, corpus: Corpus
  ) -> Sampler:
    """The function that makes any rows of any step's training batch."""
    raise NotImplementedError

  def heldout_batch(
    self,
    config: Config,
    name: str,
    corpus: Corpus,
    num_rows: int,
    seed: int = 0,
    num_chunks: int = 0,
  ) -> Batch:
    """One fixed batch, from as many held-out documents as possible.

    Args:
      num_chunks: of each context; 0 takes the most.

    Returns:
      `num_rows` rows, or fewer if the held-out documents hold no more.
    """
    raise NotImplementedError
