"""The evals by name; `config.evals` says which of them run."""

from collections.abc import Callable

from refrag_jax.config.schema import Config
from refrag_jax.evals import (
  context_length,
  copying,
  details,
  passages,
  perplexity,
  qa,
  reconstruction,
  regeneration,
  selection,
)

EVALS = {
  'log_perplexity': perplexity.run,
  'reconstruction': reconstruction.run,
  'regeneration': regeneration.run,
  'selection': selection.run,
  'qa': qa.run,
  'copying': copying.run,
  'context_length': context_length.run,
  'passages': passages.run,
  'details': details.run,
}
# Measured once, on questions, whatever texts there are.
WITHOUT_TEXT = ('qa',)


def _continued(stage: str) -> Callable[[Config], tuple[int, int]]:
  return lambda config: (
    config.stage[stage].context_length,
    max(config.eval.output_lengths),
  )


def _regenerated(config: Config) -> tuple[int, int]:
  return 0, max(config.eval.reconstruct_lengths)


def _one_passage(config: Config) -> tuple[int, int]:
  """The useful one of a context of `passages`; without any it is skipped."""
  P, k = config.eval.num_passages, config.model.chunk_size
  chunks = config.stage['mixed'].context_length // k // P if P else 0
  return chunks * k, max(config.eval.output_lengths)


# (context, output) tokens of the windows that an eval cuts from held-out text.
WINDOWS: dict[str, Callable[[Config], tuple[int, int]]] = {
  'log_perplexity': _continued('cpt'),
  'selection': _continued('mixed'),
  'passages': _one_passage,
  'details': _continued('cpt'),
  'reconstruction': _regenerated,
  'regeneration': _regenerated,
  'copying': lambda config: (0, max(config.eval.copy_lengths)),
}
