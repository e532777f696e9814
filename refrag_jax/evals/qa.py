"""Questions over passages: what is answered, and from what.

Dimension key: W questions, B batch of them, C chunks, K chunk size, O output
slots, X options of all questions.

Rows: REFRAG fine-tuned with compressed passages (no passage, the gold one, gold
among distractors, those without it, BM25's, another question's; the record's
own where none is marked gold), the same with some chunks as tokens; its twins
fine-tuned alike on full text and on no passage; and the decoder before REFRAG,
untouched. Where full text does not help its twin, the questions cannot tell
compression from ignorance, and the table says so.

Columns: NLL of the gold answer, and what the answers are judged by: exact match
and F1, of summaries ROUGE, of multiple choice the share whose right option is
the likeliest one. Where several numbers of passages are asked for, also what
the first token of one question costs, and which rows cost alike: the paper's
Figure 4 compares them at equal latency.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refrag_jax import flops, generate, results, sharding
from refrag_jax.config import check
from refrag_jax.config.schema import Config, expanded_chunks
from refrag_jax.data import batch as batch_lib
from refrag_jax.data.questions import records
from refrag_jax.data.tasks import questions
from refrag_jax.errors import UserError
from refrag_jax.evals import common, replug, selection, text_metrics
from refrag_jax.evals.eval import Eval
from refrag_jax.models import losses, policy
from refrag_jax.models.refrag import Refrag
from refrag_jax.report import tables
from refrag_jax.runtime import progress


class Row(NamedTuple):
  """Whose answers, and what they are answered from."""

  role: str
  passages: str  # of examples.KINDS; GIVEN: as the record brings them
  given_as: str  # 'chunks', 'tokens', 'last' tokens, or 'replug'
  needs_gold: bool = False


# The gold passage among distractors; where none is marked, the record's own.
GIVEN = 'gold_distractors'
ROWS = {
  'no_passage': Row('sft', 'none', 'chunks'),
  'gold': Row('sft', 'gold', 'chunks', needs_gold=True),
  'gold_distractors': Row('sft', GIVEN, 'chunks'),
  'gold_missing': Row('sft', 'gold_missing', 'chunks', needs_gold=True),
  'bm25': Row('sft', 'bm25', 'chunks'),
  'shuffled': Row('sft', 'shuffled', 'chunks'),
  'full_context_twin': Row('sft_full', GIVEN, 'tokens'),
  'full_context_twin_gold': Row('sft_full', 'gold', 'tokens', needs_gold=True),
  'full_context_twin_gold_missing': Row(
    'sft_full', 'gold_missing', 'tokens', needs_gold=True
  ),
  # As many tokens, from the end, as REFRAG has chunks.
  'last_tokens_twin': Row('sft_full', GIVEN, 'last'),
  'no_context_twin': Row('sft_none', 'none', 'tokens'),
  'full_context': Row('before', GIVEN, 'tokens'),
  'last_tokens': Row('before', GIVEN, 'last'),
  'replug': Row('before', GIVEN, 'replug'),
  'no_context': Row('before', 'none', 'tokens'),
}
# These with other numbers of passages as well.
BY_NUMBER = [ROWS[x] for x in (GIVEN, 'full_context_twin', 'full_context')]
# What REFRAG is held against at equal latency.
FULL_ROWS = ('full_context_twin', 'full_context')
TIMED = 5  # times that a first token is waited for
REFERENCES = (
  'no_passage', 'shuffled', 'full_context_twin', 'no_context_twin',
  'full_context', 'no_context',
)  # fmt: skip


def files(config: Config) -> tuple[str, ...]:
  """The files of questions that are asked."""
  named = config.eval.questions or (common.HELDOUT,)
  out = ()
  for name in named:
    out += config.data.questions if name == common.HELDOUT else (name,)
  return out


def run(context: common.Context) -> dict:
  """The `qa` table of results.json."""
  config = context.session.config
  roles = dict.fromkeys(row.role for row in ROWS.values())
  if not config.eval.num_questions or not any(map(context.available, roles)):
    return {}
  out, asked = {}, files(config)
  tally = progress.Tally('eval qa', 'rows')
  total = len(asked) * len(rows_of(config))
  for n, path in enumerate(asked):
    before = n * len(rows_of(config))
    heard = lambda row, before=before: tally('questions', before + row, total)
    try:
      out[path] = of_file(context, path, heard)
    except UserError as e:  # the others are measured all the same
      context.leave_out(f'qa of {path}', str(e))
  return out


def rows_of(config: Config) -> tuple[str, ...]:
  """Names of the rows that are asked for."""
  return config.eval.question_rows or tuple(ROWS)


def of_file(
  context: common.Context, path: str, heard: Callable[[int], None]
) -> dict[str, Any]:
  """Rows of one file of questions; of one trained on, the held-out side.

  Args:
    heard: is told before each row how many of them are done.
  """
  config = context.session.config
  trained = {os.path.realpath(name): name for name in config.data.questions}
  path = trained.get(os.path.realpath(path), path)
  split = 'heldout' if path in trained.values() else 'all'
  source = questions.build(config, split, (path,))
  marked = 'gold' in source.kinds
  rows, costs, notes = {}, {}, []
  for n, name in enumerate(rows_of(config)):
    heard(n)
    row = ROWS[name]
    kind = row.passages if marked or row.passages != GIVEN else 'given'
    name = name if marked or name != GIVEN else 'given'
    if row.needs_gold and not marked:
      continue
    if not context.available(row.role):
      context.leave_out(f'row {name} of qa', common.missing(row.role))
      continue
    asked = source.examples(kind, config.eval.num_questions)
    if row.given_as != 'replug':  # it takes the passages apart
      asked = fitted(asked, source)
    rows[name] = measure(context, source, asked, row)
    if row is ROWS[GIVEN]:
      rows |= expanded(context, source, asked, row, name)
    if row in BY_NUMBER and config.eval.question_passages:
      costs[name] = first_token_cost(context, asked, row)
      for number in config.eval.question_passages:
        other = of_number(source, number)
        asked = other.examples(kind, config.eval.num_questions)
        asked = fitted(asked, source)
        of = f'{name}_of_{number}'
        rows[of] = measure(context, other, asked, row)
        costs[of] = first_token_cost(context, asked, row)
        fewer = int((num_passages(other.config, asked) < number).sum())
        if fewer:
          notes.append(
            f'{of}: {fewer} of {len(asked["doc_B"])} questions bring fewer'
          )
  docs = source.examples('none', config.eval.num_questions)['doc_B']
  documents = context.documents_of('qa', path)
  references = dict.fromkeys((*REFERENCES, *filter(of_full_context, costs)))
  out = common.table(rows, docs, references, documents)
  for name, cost in costs.items():
    out[name]['first_token'] = cost
  if costs:
    out['at_equal_latency'] = at_equal_latency(costs)
  for full, none in (
    ('full_context_twin', 'no_context_twin'),
    ('full_context', 'no_context'),
  ):
    if {full, none} <= out.keys():
      gain = out[full]['vs'][none]['gold_nll']
      if not (results.significant(gain) and gain['mean'] < 0):
        notes.append(
          'uninformative: full context does not beat no context for its own '
          'twin, so these questions cannot show what compression keeps'
        )
      break
  if config.data.history_chunks:
    notes.append(
      'a conversation before its last turn is part of the context: the rows '
      'without context, and replug, lack it'
    )
  return out | ({'note': '; '.join(notes)} if notes else {})


def fitted(asked: dict, source) -> dict:
  """The questions in slots for the longest of them, and for any answer."""
  room = asked['output_BO'].shape[1] - source.prompt_slots
  return batch_lib.fitted(asked, most_given(asked) + room)


def most_given(asked: dict) -> int:
  """The most output slots that are given in a row, before its answer."""
  return int(asked['loss_mask_BO'].argmax(1).max())


def of_number(source, number: int):
  """The questions with up to so many passages (the paper's Figure 4)."""
  data = dataclasses.replace(source.config, num_passages=number)
  return dataclasses.replace(source, config=data)


def num_passages(data, asked: dict) -> np.ndarray:
  """How many passages each row has, (W,)."""
  len_WC = asked['chunk_len_BC'][:, data.history_chunks :]
  return (len_WC[:, :: data.passage_chunks] > 0).sum(1)


def of_full_context(name: str) -> bool:
  """Whether a row reads its passages as tokens, whatever their number."""
  return name.partition('_of_')[0] in FULL_ROWS


def first_token_cost(context, asked: dict, row: Row) -> dict:
  """What the first token of an answer costs, passages in hand.

  Tokens and chunks of the first question, padded to the longest one: those of
  one row (on a mesh, of one row a device). Chunks are encoded in it.

  Returns:
    gflop, counted from the jaxpr; and the STAT of milliseconds, compiled before
    and waited for.
  """
  rows = sharding.axis_size('batch', context.session.mesh)
  batch = batch_lib.take(asked, np.arange(rows) % len(asked['doc_B']))
  given = most_given(asked)
  batch = batch_lib.cut_outputs(batch, given + 1)
  static = dict(
    given_as=row.given_as, prompt=given, expand=0.0,
    eos_id=context.session.tokenizer.eos_id,
  )  # fmt: skip
  model, params = context.session.model, context.params(row.role)
  traced = jax.make_jaxpr(lambda *of: greedy(model, *of, **static))
  seconds = []
  for _ in range(1 + TIMED):
    start = time.perf_counter()
    common.apply(context, row.role, greedy, batch, **static)
    seconds.append(time.perf_counter() - start)
  return {
    'gflop': flops.count(traced(params, batch)) / rows / 1e9,
    'milliseconds': results.stat(1e3 * np.array(seconds[1:])),
  }


def at_equal_latency(costs: dict[str, dict]) -> list[dict[str, str]]:
  """Of each of REFRAG's rows the row of full context that costs no more.

  By FLOPs and by the clock; the one with the most of them, where there is one.
  """
  pairs = []
  by = {
    'gflop': lambda name: costs[name]['gflop'],
    'milliseconds': lambda name: costs[name]['milliseconds']['mean'],
  }
  for name in costs:
    for what, cost in () if of_full_context(name) else by.items():
      for kind in FULL_ROWS:
        cheaper = [
          other
          for other in costs
          if other.partition('_of_')[0] == kind and cost(other) <= cost(name)
        ]
        if cheaper:
          other = max(cheaper, key=by['gflop'])
          pairs.append({'row': name, 'full_context': other, 'by': what})
  return pairs


def expanded(context, source, asked, row: Row, name: str) -> dict:
  """The row with the best chunks of each question as tokens, by selector."""
  config = context.session.config
  fractions, out = config.eval.question_fractions, {}
  if not fractions:
    return out
  for selector, score_WC in selection.ragged_scores(
    context, asked, row.role
  ).items():
    scored = asked | {'score_BC': np.asarray(score_WC, np.float32)}
    for p in fractions:
      out[f'{name}_{selector}_p{p:g}'] = measure(
        context, source, scored, row, p
      )
  return out


def measure(
  context, source, asked: dict, row: Row, expand: float = 0.0
) -> dict[str, np.ndarray]:
  """Column -> value of each question, (W,).

  Args:
    asked: the questions as a batch; with score_BC, where chunks are expanded.
    expand: p, the share of a question's chunks that are tokens.
  """
  given_as = row.given_as
  if given_as == 'last':
    asked, given_as = batch_lib.last_tokens(asked), 'tokens'
  if given_as == 'replug':
    return replug_column(context, source, asked, row)
  nll = lambda batch: common.apply(
    context, row.role, answer_nll, batch, given_as=given_as, expand=expand
  )
  chosen = [source.questions[i] for i in asked['id_B']]
  if all(question.choices for question in chosen):
    columns = {'gold_nll': nll(asked)}
    row_X, options = source.options(asked)
    # Of whole options, not of their tokens in the mean: they differ in length.
    options = batch_lib.fitted(options, int(options['output_len_B'].max()))
    nll_X = nll(options) * options['loss_mask_BO'].sum(1)
    columns['accuracy'] = np.array(
      [
        question.choices[int(np.argmin(nll_X[row_X == i]))] in question.answers
        for i, question in enumerate(chosen)
      ],
      float,
    )
    return columns
  nll_W, ids_WN = common.apply(
    context, row.role, nll_and_greedy, asked, given_as=given_as,
    prompt=most_given(asked), eos_id=context.session.tokenizer.eos_id,
    expand=expand,
  )  # fmt: skip
  columns, texts = {'gold_nll': nll_W}, texts_of(context, ids_WN)
  whole = all(question.whole for question in chosen)
  metrics = text_metrics.SUMMARIES if whole else text_metrics.ANSWERS
  for name, metric in metrics.items():
    columns[name] = np.array(
      [
        metric(text, question.answers)
        for text, question in zip(texts, chosen, strict=True)
      ],
      float,
    )
  return columns


def replug_column(context, source, asked: dict, row: Row) -> dict:
  """NLL of the gold answers alone: nothing is written by the ensemble."""
  history = source.config.history_chunks
  passages = batch_lib.cut_chunks(asked, slice(history, None))
  nll_W = common.apply(
    context, row.role, replug_nll, passages,
    passages=source.config.num_passages,
  )  # fmt: skip
  return {'gold_nll': nll_W}


def texts_of(context, ids_WN: np.ndarray) -> list[str]:
  """Answers as text, each up to its end."""
  tokenizer, texts = context.session.tokenizer, []
  for ids in ids_WN.tolist():
    eos_id = tokenizer.eos_id
    end = ids.index(eos_id) if eos_id in ids else len(ids)
    texts.append(tokenizer.decode(ids[:end]).strip())
  return texts


def written(
  context, role, batch, given_as: str, prompt: int, expand: float = 0.0
) -> np.ndarray:
  """Greedy ids behind what is given, (W, O - prompt)."""
  return common.apply(
    context, role, greedy, batch, given_as=given_as, prompt=prompt,
    eos_id=context.session.tokenizer.eos_id, expand=expand,
  )  # fmt: skip


def answer_nll(model, params, batch, given_as: str, expand: float):
  """Mean NLL of each gold answer, (B,)."""
  variables = {'params': params}
  if given_as == 'tokens':
    nll_BO = model.apply(variables, batch, 'full', method=Refrag.plain_nll)
  elif expand:
    expand_BC, most = expand_share(batch, expand)
    nll_BO = model.apply(
      variables, batch | {'expand_BC': expand_BC}, most, method=Refrag.mixed_nll
    )
  else:
    nll_BO = model.apply(variables, batch, method=Refrag.compressed_nll)
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def replug_nll(model, params, batch, passages: int):
  """Mean NLL of each gold answer by the ensemble over passages, (B,)."""
  nll_BO = replug.over_passages(model, params, batch, passages)
  return losses.masked_mean(nll_BO, batch['loss_mask_BO'])


def greedy(
  model, params, batch, given_as: str, prompt: int, eos_id: int, expand: float
):
  """The most probable ids after what is given, (B, O - prompt)."""
  expand_BC, most = read_as_tokens(batch, given_as, expand)
  return generate.continuation(
    model, params, batch, expand_BC, most, prompt, eos_id
  )


def nll_and_greedy(
  model, params, batch, given_as: str, prompt: int, eos_id: int, expand: float
):
  """Mean NLL of each gold answer, (B,), and what `greedy` writes."""
  expand_BC, most = read_as_tokens(batch, given_as, expand)
  nll_BO, ids_BN = generate.scored_and_written(
    model, params, batch, expand_BC, most, prompt, eos_id
  )
  return losses.masked_mean(nll_BO, batch['loss_mask_BO']), ids_BN


def read_as_tokens(batch, given_as: str, expand: float):
  """Which chunks are tokens, bool (B, C), and the most of a row."""
  B, C, _ = batch['chunks_BCK'].shape
  if expand:
    return expand_share(batch, expand)
  as_tokens = given_as == 'tokens'
  return jnp.full((B, C), as_tokens), C if as_tokens else 0


def expand_share(batch, p: float):
  """The best floor(p L) chunks of each row's own L: a mask, and the most."""
  valid_BC = batch['chunk_len_BC'] > 0
  C = valid_BC.shape[1]
  score_BC = jnp.where(valid_BC, batch['score_BC'], policy.NEG)
  numbers = [expanded_chunks(p, L) for L in range(C + 1)]
  number_B = jnp.array(numbers)[valid_BC.sum(1)]
  picks_BR = policy.greedy(score_BC, numbers[-1])
  kept_BR = jnp.arange(numbers[-1])[None] < number_B[:, None]
  # -1 is no chunk.
  return policy.to_mask(jnp.where(kept_BR, picks_BR, -1), C), numbers[-1]


def check_questions(config: Config) -> None:
  """Refuses numbers of passages that the decoder has no positions for."""
  check.positive(config.eval, 'eval.', 'num_questions')
  questions.check_questions(config)
  check.names(config.eval.question_rows, ROWS, 'eval.question_rows')
  numbers = config.eval.question_passages
  if any(number < 1 for number in numbers):
    raise UserError(
      f'config.eval.question_passages is {numbers}: each must be 1 or more'
    )
  bad = [p for p in config.eval.question_fractions if not 0 < p < 1]
  if bad:
    raise UserError(
      f'config.eval.question_fractions holds {bad[0]}: use shares between 0 '
      'and 1'
    )
  if config.eval.question_fractions:
    check.known(config.eval.selectors, check.SELECTORS, 'eval.selectors')
  data, limit = config.data, config.model.decoder.max_length
  slots = records.output_slots(data)
  for number in (data.num_passages, *numbers):
    chunks = data.history_chunks + number * data.passage_chunks
    longest = data.question_length + chunks * config.model.chunk_size + slots
    if 0 < limit < longest:
      raise UserError(
        f'the eval qa reads {number} passages as tokens, up to {longest} '
        f'positions, and the decoder has {limit} '
        '(config.model.decoder.max_length): lower config.data.passage_chunks, '
        'or the number'
      )


EVAL = Eval(
  run=run,
  title='Questions',
  table=tables.questions,
  check=check_questions,
  reads='questions',
)
