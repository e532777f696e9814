"""`--mode=ask`: one question over a file of passages, on the terminal."""

import os
import sys

import rich
from rich import table as rich_table
from rich import text as rich_text

from refrag_jax import checkpoint
from refrag_jax.config.schema import Config
from refrag_jax.data import passages as passages_lib
from refrag_jax.errors import UserError
from refrag_jax.runtime.progress import say
from refrag_jax.serve import expansion
from refrag_jax.serve.answers import Answer, Refrag

# Whose weights a run answers with: what was trained last to do it.
STAGES = ('sft', 'mixed', 'cpt', 'reconstruct')
SHOWN = 60  # characters of a chunk in the table


def run(
  config: Config, workdir: str, question: str, passages: str, expand: str,
  selector: str, source: str,
) -> int:  # fmt: skip
  """Prints the answer as it comes, then what became of each chunk.

  Args:
    passages: a file of them; '': none, the decoder by itself.
    expand: what stays tokens, as in expansion.budget; '': nothing.
    selector: of expansion.SELECTORS; '': the default of answers.py.
    source: a checkpoint or an export; '': the run in `workdir`.

  Raises:
    UserError: something of it cannot be answered.
  """
  if not question.strip():
    raise UserError(
      'no question: --mode=ask "What is asked?" --passages=FILE.jsonl'
    )
  expansion.budget(expand or 0)  # before a minute of loading
  texts = passages_lib.read(passages) if passages else []
  source = source or _checkpoint(workdir)
  model = Refrag.of_config(config, source, pools=[(1, 0)])
  stream = model.answer(
    question, texts, expand=expand or 0, selector=selector, stream=True,
    max_tokens=config.data.answer_length,
  )  # fmt: skip
  for piece in stream:
    sys.stdout.write(piece)
    sys.stdout.flush()
  print()
  _show(stream.answer)
  return 0


def _checkpoint(workdir: str) -> str:
  for stage in STAGES:
    directory = os.path.join(workdir, 'checkpoints', stage)
    if checkpoint.latest_step(directory) is not None:
      return directory
  raise UserError(
    f'{workdir} has no checkpoint to answer with (of {", ".join(STAGES)}): '
    'train one, or name one with --from=CHECKPOINT'
  )


def _show(answer: Answer) -> None:
  """The trace as a table, and what it cost, below the answer."""
  for note in answer.notes:
    say(note)
  if answer.trace:
    grid = rich_table.Table('passage', 'chunk', 'score', 'read as')
    for chunk in answer.trace:
      passage = answer.passages[chunk.passage]
      name = passage.title or passage.id or str(chunk.passage + 1)
      score = '' if chunk.score is None else f'{chunk.score:.3f}'
      read = f'{chunk.tokens} tokens' if chunk.expanded else '1 vector'
      cells = (name[:SHOWN], repr(chunk.text)[1:-1][:SHOWN], score, read)
      grid.add_row(
        *map(rich_text.Text, cells), style='bold' if chunk.expanded else ''
      )
    rich.print(grid)
    expanded = sum(chunk.expanded for chunk in answer.trace)
    say(
      f'{answer.context_tokens} tokens of context in {len(answer.trace)} '
      f'chunks, {expanded} of them read as tokens: {answer.positions} '
      f'positions in all, one for {answer.rate:.1f} tokens of the context'
    )
  say(
    f'{len(answer.tokens)} tokens written ({answer.finish}); first token after '
    f'{answer.seconds_to_first:.2f} s, compilation included; all after '
    f'{answer.seconds:.2f} s'
  )
