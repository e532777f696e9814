"""The evals by name; `config.evals` says which of them run."""

from refrag_jax.config import check as checks
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
from refrag_jax.evals.eval import Eval, check_eval
from refrag_jax.stages import STAGES

# In the order of report.html.
EVALS: dict[str, Eval] = {
  'log_perplexity': perplexity.EVAL,
  'context_length': context_length.EVAL,
  'reconstruction': reconstruction.EVAL,
  'regeneration': regeneration.EVAL,
  'selection': selection.EVAL,
  'passages': passages.EVAL,
  'qa': qa.EVAL,
  'details': details.EVAL,
  'copying': copying.EVAL,
}


def check(config: Config) -> None:
  """Refuses evals that there are not, and what they cannot work with.

  Raises:
    UserError: in one line, what to change.
  """
  checks.names(config.evals, EVALS, 'evals')
  for name in config.evals:
    check_eval(name, EVALS[name], config)


def asks_questions(config: Config) -> bool:
  """Whether a stage or an eval reads data.questions."""
  readers = [STAGES[name].task for name in config.stages]
  readers += [EVALS[name] for name in config.evals]
  return any(reader.reads == 'questions' for reader in readers)
