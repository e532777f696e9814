"""Questions over retrieved passages, with their gold answers (stage `sft`)."""

import functools
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
  'question_template',
  'passage_template',
  'answer_template',
  'num_passages',
  'question_length',
  'passage_chunks',
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
    own['questions_content'] = records.fingerprint(config)
    return super().settings(config) | own

  def num_chunks(self, config: Config, name: str) -> int:
    del name
    return config.data.num_passages * config.data.passage_chunks

  def row_shapes(self, config: Config, name: str, num_chunks: int) -> Shapes:
    data = config.data
    return context_shapes(
      Q=data.question_length,
      C=num_chunks,
      K=config.model.chunk_size,
      M=data.max_encoder_tokens,
      O=data.answer_length,
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
  check.positive(
    data,
    'data.',
    'num_passages',
    'question_length',
    'passage_chunks',
    'answer_length',
  )
  for template, field in (
    ('question_template', '{question}'),
    ('passage_template', '{text}'),
  ):
    if field not in getattr(data, template):
      raise UserError(
        f'config.data.{template} {getattr(data, template)!r} does not contain '
        f'{field}: put it where the text belongs'
      )


def build(config: Config, split: str):
  """The questions of one side, as examples.Examples."""
  from refrag_jax.data.questions import examples  # loads BM25

  return examples.build(
    config,
    tokenizers.load(config.data.tokenizer),
    tokenizers.load(config.data.encoder_tokenizer),
    split,
  )
