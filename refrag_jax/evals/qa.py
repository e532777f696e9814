"""Questions over passages: NLL of the gold answer, exact match and F1.

Dimension key: W questions, B batch of them, C chunks, O output slots.

Rows: REFRAG fine-tuned with compressed passages (no passage, the gold one,
gold among distractors, BM25's, another question's; the record's own where none
is marked gold), beside its twins fine-tuned
alike on full text and on no passage. Where full text does not help its twin,
the questions cannot tell compression from ignorance, and the table says so.
"""

import jax.numpy as jnp
import numpy as np

from refrag_jax import generate, results
from refrag_jax.config import check
from refrag_jax.config.schema import Config
from refrag_jax.data.tasks import questions
from refrag_jax.evals import common, text_metrics
from refrag_jax.evals.eval import Eval
from refrag_jax.models import losses
from refrag_jax.models.refrag import Refrag
from refrag_jax.report import tables

# row: (role, passages, as tokens)
ROWS = {
  'no_passage': ('sft', 'none', False),
  'gold': ('sft', 'gold', False),
  'gold_distractors': ('sft', 'gold_distractors', False),
  'bm25': ('sft', 'bm25', False),
  'shuffled': ('sft', 'shuffled', False),
  'full_context_twin': ('sft_full', 'gold_distractors', True),
  'full_context_twin_gold': ('sft_full', 'gold', True),
  'no_context_twin': ('sft_none', 'none', True),
}
# Where no passage is marked as the useful one: the record's own.
UNMARKED_ROWS = {
  'no_passage': ('sft', 'none', False),
  'given': ('sft', 'given', False),
  'bm25': ('sft', 'bm25', False),
  'shuffled': ('sft', 'shuffled', False),
  'full_context_twin': ('sft_full', 'given', True),
  'no_context_twin': ('sft_none', 'none', True),
}
REFERENCES = ('no_passage', 'shuffled', 'full_context_twin', 'no_context_twin')


def run(context: common.Context) -> dict:
  """The `qa` table of results.json."""
  config = context.session.config
  if not config.eval.num_questions or not context.available('sft'):
    return {}
  source = questions.build(config, 'heldout')
  rows, docs = {}, None
  wanted = ROWS if 'gold' in source.kinds else UNMARKED_ROWS
  for row, (role, kind, as_tokens) in wanted.items():
    if not context.available(role):
      context.leave_out(f'row {row} of qa', common.missing(role))
      continue
    batch = source.examples(kind, config.eval.num_questions)
    docs = batch['doc_B']
    nll_W, texts = answer(context, role, batch, as_tokens, source.answer_prompt)
    answers = [source.questions[i].answers for i in batch['id_B']]
    pairs = list(zip(texts, answers, strict=True))
    rows[row] = {
      'gold_nll': nll_W,
      'em': np.array([text_metrics.exact_match(*p) for p in pairs], float),
      'f1': np.array([text_metrics.f1(*p) for p in pairs], float),
    }
  documents = context.documents_of('qa', config.data.questions)
  out = common.table(rows, docs, REFERENCES, documents)
  if {'full_context_twin', 'no_context_twin'} <= out.keys():
    gain = out['full_context_twin']['vs']['no_context_twin']['gold_nll']
    if not (results.significant(gain) and gain['mean'] < 0):
      out['note'] = (
        'uninformative: full context does not beat no context for its own '
        'twin, so these questions cannot show what compression keeps'
      )
  return {config.data.questions: out}


def answer(context, role, batch, as_tokens: bool, prompt: int):
  """(mean NLL of the gold answer (W,), greedy answers as text)."""
  tokenizer = context.session.tokenizer
  texts = []
  for ids in written(context, role, batch, as_tokens, prompt).tolist():
    eos_id = tokenizer.eos_id
    end = ids.index(eos_id) if eos_id in ids else len(ids)
    texts.append(tokenizer.decode(ids[:end]).strip())
  nll_W = common.apply(context, role, answer_nll, batch, as_tokens=as_tokens)
  return nll_W, texts


def written(context, role, batch, as_tokens: bool, prompt: int):
  """Greedy ids after `prompt` forced ones, (W, O - prompt)."""
  return common.apply(
    context, role, greedy, batch,
    as_tokens=as_tokens, prompt=prompt, eos_id=context.session.tokenizer.eos_id,
  )  # fmt: skip


def answer_nll(model, params, batch, as_tokens: bool):
  """Mean NLL of each gold answer, (B,)."""
  if as_tokens:
    nll_BO = model.apply(
      {'params': params}, batch, 'full', method=Refrag.plain_nll
    )
  else:
    nll_BO = model.apply(
      {'params': params}, batch, method=Refrag.compressed_nll
    )
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def greedy(model, params, batch, as_tokens: bool, prompt: int, eos_id: int):
  """The most probable ids after the first `prompt` outputs, (B, O - prompt)."""
  B, C, _ = batch['chunks_BCK'].shape
  return generate.continuation(
      model, params, batch, jnp.full((B, C), as_tokens), C if as_tokens else 0,
      prompt, eos_id,
  )  # fmt: skip


def check_questions(config: Config) -> None:
  check.positive(config.eval, 'eval.', 'num_questions')
  questions.check_questions(config)


EVAL = Eval(
  run=run,
  title='Questions',
  table=tables.questions,
  check=check_questions,
  reads='questions',
)
