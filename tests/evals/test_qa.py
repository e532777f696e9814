"""Questions: what is expanded, cut and weighed, and by what it is judged.

Dimension key: W questions, B batch, C chunks, K chunk size, O outputs.
"""

import dataclasses
import functools
import json
import threading

import forward
import jax
import numpy as np
import pytest
import toy
import toy_config
import toy_run

from refrag_jax import flops
from refrag_jax.config.schema import expanded_chunks
from refrag_jax.data import batch as batch_lib
from refrag_jax.errors import UserError
from refrag_jax.evals import common, qa, replug, selection, text_metrics
from refrag_jax.models.refrag import init_params
from refrag_jax.report import tables as report_tables

PARAMS = toy.params()
BY_NUMBER = ('gold_distractors', 'full_context_twin', 'full_context')
CHOICE = {
  'passage': 'red blue', 'question': 'hue?', 'options': ['red', 'blue'],
  'answer': 'A',
}  # fmt: skip


def file_of(path, values):
  path.write_text('\n'.join(map(json.dumps, values)) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  toy_config.write_data(folder)
  choices = [CHOICE | {'passage': f'{i} red', 'question': f'{i}: hue?',
                       'answer': 'AB'[i % 2]} for i in range(9)]  # fmt: skip
  texts = [{'text': f'sky {i}', 'summary': f'sky {i}'}
           for i in range(9)]  # fmt: skip
  cfg = toy_run.config(
    str(folder),
    data__question_length=32,
    data__question_template='Q ',
    data__answer_template='{question}\nA ',
    eval__questions=(
      'heldout',
      file_of(folder / 'choices.jsonl', choices),
      file_of(folder / 'texts.jsonl', texts),
    ),
    eval__num_questions=6,
    eval__question_fractions=(0.5,),
    eval__question_passages=(1,),
    eval__selectors=('rl', 'ppl_desc', 'random'),
  )
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


@pytest.fixture(scope='module')
def context(session):
  init = jax.jit(lambda key: init_params(session.config.model, key))
  roles = ('before', 'policy', 'sft', 'sft_full', 'sft_none')
  params = {role: init(jax.random.key(i)) for i, role in enumerate(roles)}
  return common.Context(session, params.get, {}, threading.Event(), {}, {}, [])


@pytest.fixture(scope='module')
def tables(context):
  return qa.run(context)


def test_every_file_has_the_rows_and_what_judges_it(session, tables):
  by_name = {path.rpartition('/')[2]: rows for path, rows in tables.items()}
  assert list(by_name) == ['questions.jsonl', 'choices.jsonl', 'texts.jsonl']
  columns = {
    'questions.jsonl': {'em', 'f1'},
    'choices.jsonl': {'accuracy'},
    'texts.jsonl': {'rouge1', 'rouge2', 'rougeL'},
  }
  for name, rows in by_name.items():
    more = {f'gold_distractors_{s}_p0.5' for s in session.config.eval.selectors}
    more |= {f'{row}_of_1' for row in BY_NUMBER}
    rows = {x: row for x, row in rows.items() if isinstance(row, dict)}
    assert rows.keys() == set(qa.ROWS) | more
    for row in rows.keys() - {'replug'}:
      measured = rows[row].keys() - {'vs', 'first_token'}
      assert measured == columns[name] | {'gold_nll'}
      for column in measured:
        assert rows[row][column]['n'] >= 2
  # No context is the same whatever passages there are, compression is not.
  rows = by_name['questions.jsonl']
  assert rows['no_context']['gold_nll'] != rows['full_context']['gold_nll']
  assert rows['last_tokens']['gold_nll'] != rows['full_context']['gold_nll']
  none = rows['gold_distractors']['gold_nll']['mean']
  for selector in session.config.eval.selectors:
    row = rows[f'gold_distractors_{selector}_p0.5']
    assert row['gold_nll']['mean'] != none
  # Records with one passage each: fewer passages are the same there.
  rows = by_name['texts.jsonl']
  np.testing.assert_allclose(
    rows['full_context_of_1']['gold_nll']['mean'],
    rows['full_context']['gold_nll']['mean'],
    rtol=1e-5,
  )


def test_some_rows_alone(context, tables):
  """The same numbers, and nothing else is measured."""
  config = context.session.config
  wanted = ('full_context', 'no_context')
  ev = dataclasses.replace(
    config.eval, question_rows=wanted, question_passages=()
  )
  some = context.session._replace(config=toy_run.replaced(config, eval=ev))
  path = next(path for path in tables if path.endswith('texts.jsonl'))
  heard = []
  found = qa.of_file(context._replace(session=some), path, heard.append)
  assert heard == [0, 1]  # for who waits
  rows = {name: row for name, row in found.items() if isinstance(row, dict)}
  assert rows.keys() == set(wanted)
  for name in wanted:
    assert rows[name]['gold_nll'] == tables[path][name]['gold_nll']
  bad = dataclasses.replace(config.eval, question_rows=('ful_context',))
  with pytest.raises(UserError, match="did you mean 'full_context'"):
    qa.check_questions(toy_run.replaced(config, eval=bad))


def test_rows_are_held_against_what_costs_as_much(context, tables):
  """GFLOP of a first token by hand, and the pairs that follow from them."""
  config = context.session.config
  path = next(path for path in tables if path.endswith('choices.jsonl'))
  rows, model = tables[path], config.model
  source = qa.questions.build(config, 'all', (path,))
  head = 2 * model.decoder.width * model.decoder.vocab_size

  def full(source):
    asked = source.examples('gold_distractors', config.eval.num_questions)
    longest = (
      asked['prefix_len_B'].max() + asked['loss_mask_BO'].argmax(1).max()
    )
    _, chunks = np.nonzero(asked['chunk_len_BC'])
    positions = longest + (1 + chunks.max()) * model.chunk_size
    return flops.decoder_flops(vars(model.decoder), int(positions)) + head

  for name, of in (
    ('full_context', source),
    ('full_context_of_1', qa.of_number(source, 1)),
  ):
    got = rows[name]['first_token']
    np.testing.assert_allclose(got['gflop'] * 1e9, full(of), rtol=5e-3)
    assert got['milliseconds']['n'] == qa.TIMED
    assert got['milliseconds']['mean'] > 0
  for pair in rows['at_equal_latency']:
    cost = (
      rows[pair['row']]['first_token'],
      (rows[pair['full_context']]['first_token']),
    )
    read = lambda of: of if isinstance(of, float) else of['mean']
    assert read(cost[1][pair['by']]) <= read(cost[0][pair['by']])
    assert pair['full_context'] in rows[pair['row']]['vs']
  # Of passages this short the encoder alone costs more than the tokens do.
  assert [p for p in rows['at_equal_latency'] if p['by'] == 'gflop'] == [
    {'row': row, 'full_context': f'{full}_of_1', 'by': 'gflop'}
    for row in ('gold_distractors', 'gold_distractors_of_1')
    for full in qa.FULL_ROWS
  ]
  shown = report_tables.questions({path: rows})
  assert 'full_context_twin_of_1' in shown and 'cost of the other' in shown


def test_accuracy_is_the_share_whose_right_option_is_likeliest(
  context, monkeypatch
):
  (path,) = [p for p in context.session.config.eval.questions if 'choices' in p]
  source = qa.questions.build(context.session.config, 'all', (path,))
  asked = source.examples('gold', 6)
  right_W = [source.questions[i].answers[0] == 'A' for i in asked['id_B']]

  def apply(context, role, function, batch, **static):
    return np.tile([1.0, 2.0], 6)[: len(batch['doc_B'])]  # A is always likelier

  monkeypatch.setattr(common, 'apply', apply)
  columns = qa.measure(context, source, asked, qa.ROWS['gold'])
  assert columns['accuracy'].tolist() == right_W
  assert len(set(right_W)) == 2


@pytest.mark.parametrize('p', [0.1, 0.25, 0.29, 0.5, 1.0])
def test_a_share_of_each_rows_own_chunks_is_expanded(p):
  rng = np.random.default_rng(0)
  C = 100
  there_WC = np.arange(C) < np.array([100, 7, 4, 1, 0])[:, None]
  score_WC = rng.normal(size=there_WC.shape).astype(np.float32)
  batch = {'chunk_len_BC': there_WC * 3, 'score_BC': score_WC}
  mask_WC, most = qa.expand_share(batch, p)
  mask_WC = np.asarray(mask_WC)
  assert most == expanded_chunks(p, C)
  for mask_C, there_C, score_C in zip(mask_WC, there_WC, score_WC):
    number = expanded_chunks(p, there_C.sum())
    best = np.argsort(np.where(there_C, -score_C, np.inf))[:number]
    assert set(np.flatnonzero(mask_C)) == set(best)


def test_the_last_tokens_are_as_many_as_the_chunks():
  batch = toy.batch(3, 4, seed=1)
  cut = batch_lib.last_tokens(batch)
  assert 'encoder_BCM' not in cut
  for b in range(3):
    ids = [
      i
      for c in range(4)
      for i in batch['chunks_BCK'][b, c, : batch['chunk_len_BC'][b, c]]
    ]
    number = min(np.count_nonzero(batch['chunk_len_BC'][b]), len(ids))
    assert cut['chunk_len_BC'][b, 0] == number
    assert (
      cut['chunks_BCK'][b, 0, :number].tolist() == (ids[len(ids) - number :])
    )


def plain(batch):
  run = functools.partial(forward.plain_nll, toy.model(), context='full')
  return np.asarray(toy.jit(run)(PARAMS, batch))


def test_replug_over_passages_is_the_mixture_of_each_alone():
  batch = toy.batch(3, 6, O=5, seed=2)
  batch['chunk_len_BC'] = np.array(
    [[3, 2, 3, 1, 3, 3], [3, 0, 0, 0, 2, 0], [1, 0, 0, 0, 0, 0]], np.int32
  )
  run = functools.partial(replug.over_passages, toy.model(), passages=3)
  found_BO = np.asarray(toy.jit(run)(PARAMS, batch))
  for b in range(3):
    row = batch_lib.take(batch, slice(b, b + 1))
    alone = [
      plain(batch_lib.cut_chunks(row, slice(2 * p, 2 * p + 2)))[0]
      for p in range(3)
      if batch['chunk_len_BC'][b, 2 * p : 2 * p + 2].any()
    ]
    nll_1PO = np.stack(alone)[None]
    wanted_O = np.asarray(replug.mixture(nll_1PO)[0])[0]
    np.testing.assert_allclose(found_BO[b], wanted_O, rtol=1e-4, atol=1e-5)


def test_the_perplexity_of_ragged_chunks_skips_what_is_not_there(context):
  """As of whole chunks where all are whole; and by hand where they are not."""
  source = qa.questions.build(context.session.config, 'heldout')
  asked = source.examples('gold_distractors', 6)
  shape = asked['chunk_len_BC'].shape
  len_WC = np.random.default_rng(0).integers(5, size=shape).astype(np.int32)
  asked['chunk_len_BC'] = len_WC
  nll_WC = selection.ragged_nll(context, asked)
  assert (nll_WC[len_WC == 0] == 0).all() and (nll_WC[len_WC > 0] > 0).all()
  params, model = context.params('before'), context.session.model
  for w in range(2):
    n = len_WC[w].sum()
    there_CK = np.arange(4) < len_WC[w][:, None]
    row = batch_lib.take(asked, slice(w, w + 1)) | {
      'output_BO': asked['chunks_BCK'][w][there_CK][None],
      'output_len_B': np.array([n], np.int32),
      'loss_mask_BO': np.ones((1, n), bool),
    }
    nll_O = np.asarray(forward.plain_nll(model, params, row, context='none'))[0]
    wanted = [
      part.mean()
      for part in np.split(nll_O, np.cumsum(len_WC[w])[:-1])
      if len(part)
    ]
    np.testing.assert_allclose(nll_WC[w][len_WC[w] > 0], wanted, rtol=1e-4)


def test_rouge_is_googles(monkeypatch):
  rouge = text_metrics.SUMMARIES
  assert rouge['rouge1']('the cat sat', ['the cat sat']) == 1.0
  # Two of three words of each; one of two pairs of words.
  assert rouge['rouge1']('the cat ran', ['the cat sat']) == pytest.approx(2 / 3)
  assert rouge['rouge2']('the cat ran', ['the cat sat']) == pytest.approx(1 / 2)
  assert rouge['rougeL']('', ['the cat sat', 'x']) == 0.0
  best = rouge['rougeL']('sat the cat', ['a', 'the cat sat'])
  assert best == pytest.approx(2 / 3)
  text_metrics._scorer.cache_clear()
  monkeypatch.setitem(__import__('sys').modules, 'rouge_score', None)
  with pytest.raises(UserError, match='pip install rouge-score'):
    rouge['rouge1']('a', ['a'])
  text_metrics._scorer.cache_clear()


def test_no_questions_for_an_eval_are_no_rows(context):
  cfg = context.session.config
  none = dataclasses.replace(cfg.eval, num_questions=0)
  cfg = dataclasses.replace(cfg, eval=none)
  asked = context._replace(session=context.session._replace(config=cfg))
  assert qa.run(asked) == {}


def test_empty_slots_change_nothing(context, session):
  """Where no row has them, prefix, chunks and outputs are left out."""
  cfg = session.config
  source = qa.questions.build(cfg, 'heldout', cfg.data.questions)
  asked = source.examples('gold', 6)  # fewer passages than there are slots for
  cut = qa.fitted(asked, source)
  before, after = (
    x['prefix_BQ'].shape[1] + x['chunks_BCK'].shape[1] + x['output_BO'].shape[1]
    for x in (asked, cut)
  )
  assert after < before
  room = cut['output_BO'].shape[1] - qa.most_given(cut)
  assert room == cfg.data.answer_length
  for given_as in ('chunks', 'tokens'):
    row = qa.Row('sft', 'gold', given_as)
    whole, least = (qa.measure(context, source, x, row) for x in (asked, cut))
    for name, values in whole.items():
      np.testing.assert_allclose(values, least[name], rtol=1e-5, err_msg=name)
    for x, prompt in ((asked, source.prompt_slots), (cut, qa.most_given(cut))):
      how = dict(given_as=given_as, prompt=prompt, eos_id=0, expand=0.0)
      nll_W, ids_WN = common.apply(context, 'sft', qa.nll_and_greedy, x, **how)
      alone_W = common.apply(
        context, 'sft', qa.answer_nll, x, given_as=given_as, expand=0.0
      )
      np.testing.assert_allclose(nll_W, alone_W, rtol=1e-5)
      np.testing.assert_array_equal(
        ids_WN, common.apply(context, 'sft', qa.greedy, x, **how)
      )
