"""The evals by name; `config.evals` says which of them run."""

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
