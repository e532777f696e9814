"""The evals by name; `config.evals` says which of them run."""

from refrag_jax.evals import perplexity, qa, reconstruction, selection

EVALS = {
  'log_perplexity': perplexity.run,
  'reconstruction': reconstruction.run,
  'selection': selection.run,
  'qa': qa.run,
}
