"""Questions without a whole config: what the examples read of one."""

import types

from refrag_jax.data import tokenizers
from refrag_jax.data.questions import examples as rag

TOKENIZER = tokenizers.load('bytes')


def make_config(**data):
  """What `rag` reads of a Config, with k = 4."""
  defaults = dict(
    questions='stdlib',
    question_weights=(),
    chat=False,
    history_chunks=0,
    question_template='Q: {question}\n',
    passage_template='{title}.{text}\n',
    answer_template='A: ',
    num_passages=3,
    question_length=88,
    passage_chunks=32,
    answer_length=32,
    heldout_fraction=0.2,
    max_encoder_tokens=8,
  )
  values = defaults | data
  if isinstance(values['questions'], str):
    values['questions'] = (values['questions'],)
  return types.SimpleNamespace(
    data=types.SimpleNamespace(**values),
    model=types.SimpleNamespace(chunk_size=4),
  )


def build(split='train', tokenizer=TOKENIZER, **data):
  return rag.build(make_config(**data), tokenizer, TOKENIZER, split)


def context_text(batch, row):
  """The passages of a row, decoded from their chunks."""
  slots = batch['chunk_len_BC'].shape[1] // 3
  passages = []
  for p in range(3):
    ids = []
    for c in range(p * slots, (p + 1) * slots):
      ids += batch['chunks_BCK'][
        row, c, : batch['chunk_len_BC'][row, c]
      ].tolist()
    passages.append(TOKENIZER.decode(ids))
  return [text for text in passages if text]
