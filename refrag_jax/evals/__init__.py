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
  """Whether a stage or an eval asks questions."""
  return bool(question_files(config))


def question_files(config: Config) -> tuple[str, ...]:
  """The files of questions that a stage or an eval reads."""
  reads = lambda readers: any(x.reads == 'questions' for x in readers)
  files = ()
  if reads([STAGES[name].task for name in config.stages]):
    files += config.data.questions
  if reads([EVALS[name] for name in config.evals]):
    files += qa.files(config)
  return tuple(dict.fromkeys(files))
