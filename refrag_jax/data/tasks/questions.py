"""Questions over retrieved passages, with their gold answers (stage `sft`)."""

import functools
from collections.abc import Sequence
from typing import Any

from refrag_jax.config import check
from refrag_jax.config.schema import Config
from refrag_jax.data import tokenizers
from refrag_jax.data.batch import Batch
from refrag_jax.data.questions import records
from refrag_jax.data.tasks.task import Sampler, Shapes, Task
from refrag_jax.data.tasks.windows import context_shapes
from refrag_jax.data.text.corpus import Corpus
from refrag_jax.errors import UserError

# What of config.data the batches depend on, beside the questions themselves.
SETTINGS = (
  'question_weights',
  'chat',
  'question_template',
  'passage_template',
  'answer_template',
  'num_passages',
  'question_length',
  'passage_chunks',
  'history_chunks',
  'answer_length',
  'heldout_fraction',
)


class Questions(Task):
  """Question, passages in chunks, then the answer's template and the answer."""

  reads = 'questions'

  def check(self, config: Config, name: str) -> None:
    del name
    check_questions(config)

  def settings(self, config: Config) -> dict[str, Any]:
    own = {key: getattr(config.data, key) for key in SETTINGS}
    own['questions_content'] = records.fingerprint(config.data.questions)
    return super().settings(config) | own

  def num_chunks(self, config: Config, name: str) -> int:
    del name
    data = config.data
    return data.num_passages * data.passage_chunks + data.history_chunks

  def row_shapes(self, config: Config, name: str, num_chunks: int) -> Shapes:
    data = config.data
    return context_shapes(
      Q=data.question_length,
      C=num_chunks,
      K=config.model.chunk_size,
      M=data.max_encoder_tokens,
      O=records.output_slots(data),
    )

  def sampler(
    self, config: Config, name: str, seed: int, corpus: Corpus
  ) -> Sampler:
    del name, corpus
    return functools.partial(build(config, 'train').batch, seed)

  def heldout_batch(
    self,
    config: Config,
    name: str,
    corpus: Corpus,
    num_rows: int,
    seed: int = 0,
    num_chunks: int = 0,
  ) -> Batch:
    """Questions with the gold passage among distractors, where it is known."""
    del name, corpus, seed, num_chunks
    source = build(config, 'heldout')
    known = 'gold_distractors' in source.kinds
    return source.examples('gold_distractors' if known else 'given', num_rows)


def check_questions(config: Config) -> None:
  """Refuses a config with which no question can be asked."""
  data = config.data
  if not data.questions:
    raise UserError(
      "config.data.questions is empty: name 'stdlib' or a JSONL file, or take "
      "the sft stages and the eval 'qa' out"
    )
  weights = data.question_weights
  if weights and len(weights) != len(data.questions):
    raise UserError(
      f'config.data.question_weights has {len(weights)} entries for '
      f'{len(data.questions)} entries of config.data.questions: give one '
      'weight a file, or none at all for equal shares'
    )
  if any(weight <= 0 for weight in weights):
    raise UserError(
      f'config.data.question_weights {weights}: weights must be greater than '
      '0; leave a file out of config.data.questions instead'
    )
  check.not_negative(data, 'data.', 'history_chunks')
  check.positive(
    data,
    'data.',
    'num_passages',
    'question_length',
    'passage_chunks',
    'answer_length',
  )
  for field, *templates in (
    ('{question}', 'question_template', 'answer_template'),
    ('{text}', 'passage_template'),
  ):
    if not any(field in getattr(data, template) for template in templates):
      raise UserError(
        f'config.data.{templates[0]} {getattr(data, templates[0])!r} does not '
        f'contain {field}: put it where the text belongs'
        + ''.join(f', or into {other}' for other in templates[1:])
      )


def build(config: Config, split: str, files: Sequence[str] = ()):
  """The questions of one side, as examples.Source; see examples.build."""
  from refrag_jax.data.questions import examples  # loads BM25

  return examples.build(
    config,
    tokenizers.load(config.data.tokenizer),
    tokenizers.load(config.data.encoder_tokenizer),
    split,
    files,
  )
