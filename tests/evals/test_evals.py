"""Evals: which rows, from which weights, over which chunks; tables by hand.

Dimension key: W windows, C chunks, O outputs.
"""

import collections
import dataclasses
import functools
import json
import os
import threading

import forward
import jax
import jax.extend
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import checkpoint, evaluate, resolve, results
from refrag_jax import run as training
from refrag_jax.data.tasks import windows as windows_task
from refrag_jax.errors import Stopped, UserError
from refrag_jax.evals import (
  EVALS,
  common,
  perplexity,
  qa,
  reconstruction,
  regeneration,
  replug,
  selection,
)
from refrag_jax.models.refrag import init_params
from refrag_jax.report import run as report
from refrag_jax.runtime import files
from refrag_jax.stages import lm
from refrag_jax.state import TrainState

K, C = 4, 4  # of toy_config.py
SELECTORS = ('rl', 'ppl_desc', 'ppl_asc', 'random', 'last', 'oracle')
PLAIN_ROWS = ('no_context', 'full_context', 'last_k')
CEPE_ROWS = ('cepe', 'cepe_unfrozen')
STAT = {'mean', 'se', 'n'}


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
  cfg = toy_run.config(folder, model__piece_length=4)
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


@pytest.fixture(scope='module')
def params(session):
  """role -> random parameters, other ones for each; a policy with opinions."""
  init = jax.jit(lambda key: init_params(session.config.model, key))
  out = {}
  for i, role in enumerate(common.ROLES):
    out[role] = init(jax.random.key(i))
    kernel = out[role]['policy']['score']['kernel']
    noise = jax.random.normal(jax.random.key(i), kernel.shape)
    out[role]['policy']['score']['kernel'] = noise
  return out


@pytest.fixture(scope='module')
def context(session, params):
  return surroundings(session, params)


def surroundings(session, params, stop=None):
  return common.Context(
    session,
    params.get,
    {'toy': session.corpus},
    stop or threading.Event(),
    {},
    {},
    [],
  )


@pytest.fixture(scope='module')
def windows(session):
  cfg = session.config
  return windows_task.eval_windows(cfg, session.corpus, C * K, 6, 16)


@pytest.fixture(scope='module')
def score(context, windows):
  """Each selector's score of each chunk."""
  return selection.scores(context, windows, 0)


@pytest.fixture(scope='module')
def tables(context):
  """Each eval of this file, run once; test_evidence.py has the others."""
  names = (
    'log_perplexity', 'reconstruction', 'regeneration', 'selection', 'qa',
  )  # fmt: skip
  return {name: EVALS[name].run(context) for name in names}


def document_means(windows, nll_WO, length=6):
  values = nll_WO[:, :length].mean(1)
  return results.by_document(np.asarray(values), windows['doc_B'])


def assert_stats(tree):
  """Every leaf dict is a STAT with finite numbers."""
  if isinstance(tree, dict) and tree.keys() >= STAT:
    assert np.isfinite(tree['mean']) and tree['n'] > 1
  elif isinstance(tree, dict):
    for value in tree.values():
      assert_stats(value)


def test_log_perplexity_has_every_row(tables):
  rows = tables['log_perplexity']['toy']
  decoders = ('', '_trained', '_cpt_trained')
  expected = {
    row + suffix for row in (*PLAIN_ROWS, 'replug') for suffix in decoders
  }
  expected |= {
    f'refrag_k4{suffix}'
    for which in ('', '_cpt', '_frozen')
    for suffix in (which, f'{which}_shuffled')
  }
  expected |= {
    f'refrag_k4_{name}_p{p}'
    for name in (*SELECTORS, 'cpt_random')
    for p in ('0.25', '0.5')
  }
  expected |= {
    f'{row}{suffix}' for row in CEPE_ROWS for suffix in ('', '_shuffled')
  }
  assert rows.keys() == expected
  for name, row in rows.items():
    assert row.keys() == {'P3', 'P6', 'bits_per_byte', 'vs'}
    assert_stats(row)
    assert name not in row['vs']
    assert {'no_context_trained', 'refrag_k4_shuffled'} - {name} <= (
      row['vs'].keys()
    )
    # One token is one byte here.
    np.testing.assert_allclose(
      row['bits_per_byte']['P6'], row['P6']['mean'] / np.log(2)
    )


def test_rows_without_their_checkpoint_are_left_out(session, params):
  some = {role: params[role] for role in ('before', 'mixed')}
  rows = perplexity.run(surroundings(session, some))['toy']
  expected = {*PLAIN_ROWS, 'replug', 'refrag_k4', 'refrag_k4_shuffled'}
  expected |= {
    f'refrag_k4_{name}_p{p}'
    for name in set(SELECTORS) - {'rl'}
    for p in ('0.25', '0.5')
  }
  assert rows.keys() == expected
  assert reconstruction.run(surroundings(session, {})) == {}
  assert selection.run(surroundings(session, {})) == {}
  assert qa.run(surroundings(session, {})) == {}


@pytest.mark.slow
def test_each_row_is_measured_with_its_own_weights(
  session, params, context, tables, windows
):
  """Each row is of the weights that its name says."""
  rows = tables['log_perplexity']['toy']
  plain = jax.jit(
    functools.partial(forward.plain_nll, session.model), static_argnums=2
  )
  compressed = jax.jit(functools.partial(forward.compressed_nll, session.model))
  other_W = common.other_document(windows['doc_B'])
  cepe = jax.jit(functools.partial(forward.cepe_nll, session.model))
  ensemble = jax.jit(functools.partial(replug.nll, session.model))
  random_WC = selection.scores(context, windows, 0)['random']

  def expanded(params, draws):
    mask_WC = selection.expand_top(np.asarray(random_WC, np.float32), draws, 0)
    c_BCE = forward.chunk_vectors(session.model, params, windows)
    return forward.output_nll(
      session.model, params, windows, c_BCE, mask_WC, draws
    )

  read = ('chunks', 'chunk_', 'encoder', 'piece')
  swapped = windows | {
    key: windows[key][other_W] for key in windows if key.startswith(read)
  }
  for row, nll_WO in {
    'no_context': plain(params['before'], windows, 'none'),
    'no_context_trained': plain(params['trained'], windows, 'none'),
    'full_context_trained': plain(params['trained'], windows, 'full'),
    'last_k': plain(params['before'], windows, 'last_k'),
    'refrag_k4': compressed(params['mixed'], windows),
    'refrag_k4_shuffled': compressed(params['mixed'], swapped),
    'refrag_k4_cpt': compressed(params['cpt'], windows),
    'refrag_k4_cpt_random_p0.25': expanded(params['cpt'], 1),
    'refrag_k4_random_p0.25': expanded(params['policy'], 1),
    'replug': ensemble(params['before'], windows),
    'replug_trained': ensemble(params['trained'], windows),
    'cepe': cepe(params['cepe'], windows),
    'cepe_shuffled': cepe(params['cepe'], swapped),
    'cepe_unfrozen': cepe(params['cepe_unfrozen'], windows),
  }.items():
    for length in (3, 6):
      mean = document_means(windows, nll_WO, length).mean()
      np.testing.assert_allclose(rows[row][f'P{length}']['mean'], mean, 1e-5)


def test_shuffled_swaps_the_chunks_of_every_window(tables, windows):
  other_W = common.other_document(windows['doc_B'])
  assert (windows['doc_B'][other_W] != windows['doc_B']).all()
  for name, row in (
    ('log_perplexity', 'refrag_k4'),
    ('reconstruction', 'refrag_k4'),
  ):
    difference = tables[name]['toy'][row]['vs'][f'{row}_shuffled']
    for column, stat in difference.items():
      assert stat['mean'] != 0 and stat['se'] > 0, (name, column)


@pytest.mark.parametrize('seed', range(20))
def test_another_document_is_never_the_same_one(seed):
  rng = np.random.default_rng(seed)
  W = int(rng.integers(2, 30))
  # In runs, as windows come, or mixed; one document may have most of them.
  doc_W = rng.integers(0, 4, W) ** 2 // 3
  if seed % 2:
    doc_W = np.sort(doc_W)
  if len(set(doc_W)) == 1:
    doc_W[0] += 1
  index_W = common.other_document(doc_W)
  assert (doc_W[index_W] != doc_W).all()


def test_one_document_in_all_keeps_its_own():
  assert common.other_document(np.zeros(3, int)).shape == (3,)


def test_table_by_hand():
  """Two windows of document 0, one of document 1."""
  doc_W = np.array([0, 0, 1])
  rows = {
    'a': {'P1': np.array([1.0, 3.0, 5.0])},  # documents 2, 5
    'b': {'P1': np.array([1.0, 1.0, 2.0]), 'P2': np.array([0.0, 0.0, 1.0])},
  }
  documents = {'doc': [], 'rows': {'before': {}}}
  out = common.table(rows, doc_W, ('b', 'absent'), documents, bits_per_nat=2.0)
  assert out['a']['P1'] == pytest.approx({'mean': 3.5, 'se': 1.5, 'n': 2})
  assert out['b']['P1'] == {'mean': 1.5, 'se': 0.5, 'n': 2}
  # Paired: 2 - 1 = 1 and 5 - 2 = 3, and not the difference of two tables.
  assert out['a']['vs'] == {'b': {'P1': {'mean': 2.0, 'se': 1.0, 'n': 2}}}
  assert out['b']['vs'] == {}
  assert out['a']['bits_per_byte'] == {'P1': 7.0}
  assert 'bits_per_byte' not in common.table(rows, doc_W, (), documents)['a']
  # The document means themselves, for comparisons with other runs.
  assert documents['doc'].tolist() == [0, 1]
  assert documents['rows'].keys() == {'before', 'a', 'b'}
  assert documents['rows']['a']['P1'].tolist() == [2, 5]


def test_batches_cover_ragged_rows_once(context):
  rows = 13  # of batches of 8
  double = jax.jit(lambda batch: batch['x'] * 2)
  batch = {'x': np.arange(rows), 'doc_B': np.zeros(rows)}
  got = common.map_batches(context, double, batch)
  np.testing.assert_array_equal(got, np.arange(rows) * 2)
  size = jax.jit(lambda batch: batch['x'] * 0 + batch['x'].shape[0])
  assert (common.map_batches(context, size, batch) == 8).all()
  assert (common.map_batches(context, size, batch, rows=4) == 4).all()
  few = {key: value[:3] for key, value in batch.items()}
  np.testing.assert_array_equal(
    common.map_batches(context, double, few), [0, 2, 4]
  )


def test_a_stop_request_ends_the_evals(session, params, windows):
  stop = threading.Event()
  stop.set()
  with pytest.raises(Stopped, match='the same command'):
    perplexity.measure(surroundings(session, params, stop), windows)


def test_the_oracle_beats_every_single_expansion(context, windows, score):
  """At T' = 1 on the same windows, window by window."""
  assert score.keys() == set(SELECTORS)
  nll = lambda score_WC: selection.selected_nll(
    context, 'policy', windows, score_WC, 1
  ).mean(1)
  oracle_W = nll(score['oracle'])
  single_CW = [nll(np.eye(C)[[i] * 16]) for i in range(C)]
  np.testing.assert_allclose(oracle_W, np.min(single_CW, 0), rtol=1e-6)
  for name in SELECTORS:
    assert (oracle_W <= nll(score[name]) + 1e-6).all(), name
  # Its score is the reward itself.
  np.testing.assert_allclose(score['oracle'].T, -np.array(single_CW), rtol=1e-5)


def test_selectors_differ_in_what_they_expand(context, windows, score):
  mask = lambda name, draws: np.asarray(
    selection.expand_top(np.asarray(score[name], np.float32), draws, 0)
  )
  assert (mask('last', 1) == [False, False, False, True]).all()
  assert (mask('last', 2) == [False, False, True, True]).all()
  np.testing.assert_array_equal(score['ppl_desc'], -score['ppl_asc'])
  assert (mask('ppl_desc', 2) != mask('ppl_asc', 2)).all()
  picks = mask('random', 1).argmax(1)
  assert len(set(picks.tolist())) > 1
  fresh = context._replace(memo={})
  again = selection.scores(fresh, windows, 0)['random']
  np.testing.assert_array_equal(again, score['random'])


def test_evals_share_what_they_have_in_common(session, params, monkeypatch):
  """The oracle, by far the most expensive: once a tail, not once an eval."""
  tails, expanded = [], []
  gains, nll = selection.single_gains, selection.selected_nll

  def counted_gains(model, weights, batch, tail):
    tails.append(tail)
    return gains(model, weights, batch, tail)

  def counted_nll(context, role, windows, score_WC, draws, tail=0, rows=0):
    if draws and role == 'policy':
      expanded.append((draws, tail))
    return nll(context, role, windows, score_WC, draws, tail, rows)

  monkeypatch.setattr(selection, 'single_gains', counted_gains)
  monkeypatch.setattr(selection, 'selected_nll', counted_nll)
  fresh = surroundings(session, params)
  for name in ('log_perplexity', 'selection', 'details'):
    EVALS[name].run(fresh)
  assert tails == [0, session.config.eval.tail_chunks]  # counts traces
  assert set(collections.Counter(expanded).values()) == {len(SELECTORS)}


LONG = ('log_perplexity', 'selection', 'qa', 'details')  # ten seconds each
LARGEST_CONSTANT = 4096  # bytes: a table of positions, say


def captured(jaxpr):
  """Arrays that a program holds, in all programs within it too."""
  yield from jaxpr.consts
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
    ):
      if isinstance(value, jax.extend.core.ClosedJaxpr):
        yield from captured(value)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in (*EVALS, 'policy_pictures')
  ],
)
def test_parameters_are_arguments(session, params, monkeypatch, name):
  """Captured, they are a constant of each program, on every device whole; and
  where processes share them out there is no such program."""
  seen = []

  def watched(params, batch, **static):
    program = functools.partial(call, **static)
    traced = jax.make_jaxpr(program)(params, batch)
    seen.append(max([x.nbytes for x in captured(traced)], default=0))
    return compiled(params, batch, **static)

  # Traced without its memory of what other tests have compiled.
  compiled, call = common.call, common.call.__wrapped__
  monkeypatch.setattr(common, 'call', watched)
  wide = dataclasses.replace(
    session.config.eval, context_lengths=(16,), num_passages=2
  )
  config = dataclasses.replace(session.config, eval=wide)
  context = surroundings(session._replace(config=config), params)
  run = EVALS[name].run if name in EVALS else selection.policy_pictures
  assert run(context)
  assert seen
  assert max(seen) <= LARGEST_CONSTANT


@pytest.mark.parametrize('draws', [0, 1, 2])
def test_the_tail_is_expanded_in_every_row(score, draws):
  for tail in (0, 1, 2):
    for score_WC in score.values():
      mask_WC = np.asarray(
        selection.expand_top(np.asarray(score_WC, np.float32), draws, tail)
      )
      assert mask_WC[:, C - tail :].all()
      # What is selected is selected besides.
      assert (mask_WC.sum(1) == draws + tail).all()


def test_selection_rows(session, params, tables, windows):
  rows = tables['selection']['toy']
  keys = [
    (row.get('tail_expanded', False), row['p'], row['selector']) for row in rows
  ]
  assert len(set(keys)) == len(keys) == 2 * (1 + 2 * len(SELECTORS))
  for row in rows:
    tail = 1 if row.get('tail_expanded') else 0
    expanded = int(row['p'] * C) + tail
    assert row['expanded'] == expanded
    share = expanded / C
    assert row['rate'] == pytest.approx(K / (1 - share + K * share))
    assert_stats(row)
    if row['selector'] != 'none':
      assert {'vs_random', 'vs_last', 'vs_none'} <= row.keys()
    if row['selector'] == 'last':
      assert row['vs_last']['mean'] == 0

  @jax.jit
  def direct(params, expand_BC):
    c_BCE = forward.chunk_vectors(session.model, params, windows)
    return forward.output_nll(
      session.model, params, windows, c_BCE, expand_BC, 2
    )

  # `none` and `last` at T' = 1 with the tail expanded.
  for name, first in (('none', 3), ('last', 2)):
    (row,) = (
      row
      for row in rows
      if row.get('tail_expanded')
      and row['selector'] == name
      and row['p'] in (0.0, 0.25)
    )
    expand_WC = np.broadcast_to(np.arange(C) >= first, (16, C))
    nll_WO = direct(params['policy'], expand_WC)
    mean = document_means(windows, nll_WO).mean()
    np.testing.assert_allclose(row['nll']['mean'], mean, rtol=1e-5)


def test_a_policy_alone_selects_for_the_model_it_was_trained_on(
  session, params, tables
):
  """An arm that trains another policy has no `mixed` of its own."""
  alone = surroundings(session, {'policy': params['policy']})
  rows = selection.run(alone)['toy']
  whole = {
    (row.get('tail_expanded', False), row['p'], row['selector']): row
    for row in tables['selection']['toy']
  }
  assert {row['selector'] for row in rows} == {
    'none', 'rl', 'random', 'last', 'oracle',
  }  # fmt: skip
  for row in rows:
    key = row.get('tail_expanded', False), row['p'], row['selector']
    assert row['nll'] == whole[key]['nll']


def test_rates_of_the_papers_table_13():
  assert selection.rate(16, 8, 128) == pytest.approx(8.258, abs=5e-4)
  assert selection.rate(16, 17, 256) == pytest.approx(8.0157, abs=5e-5)
  assert selection.rate(16, 0, 128) == 16
  assert selection.rate(16, 128, 128) == 1


def test_chunk_perplexity_is_the_mean_over_the_chunks_tokens(
  session, params, windows
):
  """In context, after all text before it; against plain language modelling."""
  nll_WC = jax.jit(functools.partial(selection.chunk_nll, session.model))(
    params['before'], windows
  )
  tokens_WT = np.concatenate(
    [windows['prefix_BQ'], windows['chunks_BCK'].reshape(16, -1)], axis=1
  )
  rows = {
    'tokens_BT': tokens_WT,
    'segment_ids_BT': np.ones_like(tokens_WT),
    'positions_BT': np.broadcast_to(
      np.arange(tokens_WT.shape[1]), tokens_WT.shape
    ),
  }
  token_nll_WT, _ = jax.jit(
    functools.partial(lm.nll, session.model, variant=None)
  )(params['before'], rows)
  expected_WC = np.asarray(token_nll_WT).reshape(16, C, K).mean(-1)
  np.testing.assert_allclose(nll_WC, expected_WC, rtol=1e-5)


def test_reconstruction_rows(session, params, tables):
  rows = tables['reconstruction']['toy']
  frozen = {'refrag_k4', 'refrag_k4_shuffled', 'no_context'}
  unfrozen = ('refrag_k4_unfrozen', 'refrag_k4_unfrozen_shuffled')
  assert rows.keys() == {*frozen, *unfrozen, 'no_context_unfrozen'}
  for row in rows.values():
    assert {'P4', 'P16'} <= row.keys()
    assert_stats(row)
  batch = windows_task.reconstruction_windows(
    session.config, session.corpus, 16, session.config.eval.num_windows
  )
  compressed = jax.jit(functools.partial(forward.compressed_nll, session.model))
  for ending in ('', '_unfrozen'):
    nll_WO = compressed(params[f'reconstruct{ending}'], batch)
    nll_W = np.asarray(nll_WO).mean(1)
    mean = results.by_document(nll_W, batch['doc_B']).mean()
    row = rows[f'refrag_k4{ending}']
    np.testing.assert_allclose(row['P16']['mean'], mean, rtol=1e-5)


def test_regeneration_rows(session, params, context, tables):
  """What `greedy` writes; the source's own embeddings and another's."""
  rows = tables['regeneration']['toy']
  names = ('refrag_k4', 'refrag_k4_unfrozen')
  assert rows.keys() - {'texts'} == {
    *names, *(f'{name}_shuffled' for name in names),
  }  # fmt: skip
  batch = windows_task.reconstruction_windows(
    session.config, session.corpus, 16, session.config.eval.num_windows
  )
  ids_WN = qa.written(context, 'reconstruct_unfrozen', batch, 'chunks', 0)
  source_WN = batch['output_BO']
  assert ids_WN.shape == source_WN.shape
  # Each token is the most probable one after those before it.
  nll = jax.jit(functools.partial(forward.compressed_nll, session.model))
  weights = params['reconstruct_unfrozen']
  best_WN = nll(weights, batch | {'output_BO': ids_WN})
  for n in (0, 5):
    for change in (1, 7, 50):
      other_WN = ids_WN.copy()
      other_WN[:, n] = (other_WN[:, n] + change) % 256
      nll_WN = nll(weights, batch | {'output_BO': other_WN})
      assert np.all(nll_WN[:, n] >= best_WN[:, n])
  row = rows['refrag_k4_unfrozen']
  assert_stats(row)
  for column, values_W in regeneration.compare(ids_WN, source_WN).items():
    mean = results.by_document(values_W, batch['doc_B']).mean()
    np.testing.assert_allclose(row[column]['mean'], mean, rtol=1e-5)
  text = rows['texts'][-1]
  assert text['row'] == 'refrag_k4_unfrozen' and len(text['source']) == 16
  found = regeneration.compare(np.array([[1, 1, 2]]), np.array([[3, 1, 1]]))
  np.testing.assert_allclose(found['share'], [2 / 3])
  np.testing.assert_allclose(found['same_place'], [1 / 3])


@pytest.mark.parametrize('name', ['reconstruction', 'regeneration'])
def test_another_data_set_compiles_nothing(session, context, tables, name):
  datasets = {'toy': session.corpus, 'again': session.corpus}
  with toy_run.watch_compiles() as seen:
    found = EVALS[name].run(context._replace(datasets=datasets))
  assert seen == [] and found['again'] == tables[name]['toy']


def test_qa_rows(session, params, tables):
  (rows,) = tables['qa'].values()
  assert rows.keys() - {'note'} == set(qa.ROWS)
  for name in qa.ROWS:
    row = rows[name]
    assert_stats(row)
    if name == 'replug':  # it writes nothing
      assert row.keys() == {'gold_nll', 'vs'}
      continue
    assert row.keys() == {'gold_nll', 'em', 'f1', 'vs'}
    assert 0 <= row['em']['mean'] <= row['f1']['mean'] <= 1


def test_qa_without_gold_marks_has_the_records_own_passages(
  session, params, tmp_path
):
  """A plain DPR file: beside its twin with the same passages as tokens."""
  data = session.config.data
  path = tmp_path / 'plain.jsonl'
  with open(*data.questions) as f:
    records = [json.loads(line) for line in f]
  for r in records:
    for ctx in r['ctxs']:
      del ctx['gold']
  path.write_text('\n'.join(map(json.dumps, records)))
  data = dataclasses.replace(data, questions=(str(path),))
  cfg = toy_run.replaced(session.config, data=data)
  context = surroundings(session._replace(config=cfg), params)
  (rows,) = EVALS['qa'].run(context).values()
  known = {name for name, row in qa.ROWS.items() if not row.needs_gold}
  assert rows.keys() - {'note'} == known - {'gold_distractors'} | {'given'}
  assert {'given', 'full_context_twin'} <= rows.keys()
  assert 'full_context_twin' in rows['given']['vs']
  given, shuffled = (rows[r]['gold_nll']['mean'] for r in ('given', 'shuffled'))
  assert given != shuffled


@pytest.mark.parametrize(
  ('gain', 'informative'), [(-1.0, True), (1.0, False), (0.0, False)]
)
def test_qa_says_when_the_questions_show_nothing(
  context, monkeypatch, gain, informative
):
  """Where full context does not beat none for its own twin."""

  def measure(context, source, asked, row):
    rng = np.random.default_rng(0)
    W = len(asked['doc_B'])
    nll_W = 3 + (gain if row.role == 'sft_full' else 0) + rng.normal(0, 0.1, W)
    return {'gold_nll': nll_W}

  monkeypatch.setattr(qa, 'measure', measure)
  (rows,) = qa.run(context).values()
  assert ('note' in rows) != informative


def test_pictures_of_the_policy(session, context):
  examples = selection.policy_pictures(context, num=3)
  assert len(examples) == 3
  for example in examples:
    text = ''.join(example['text_chunks']) + example['output']
    assert any(
      text in session.corpus.document_text(doc)
      for doc in session.corpus.documents('heldout')
    )
    best = np.argsort(example['scores'])[-sum(example['expanded']) :]
    assert set(np.flatnonzero(example['expanded'])) == set(best)


def test_text_of_ones_own_needs_no_training_text(
  mixed_text, monkeypatch, tmp_path
):
  """Who has a checkpoint seldom has what it was trained on."""
  seen = {}
  monkeypatch.setattr(evaluate, '_stages_beside', lambda _: {'lm': 'there'})
  monkeypatch.setattr(evaluate.report, 'write', lambda *_: None)

  def run_evals(opened, paths, stop):
    seen.update(evaluate._datasets(opened))
    yield {}, [], {}

  monkeypatch.setattr(evaluate, 'run_evals', run_evals)
  cfg = toy_run.config(
    toy_config.write_data(mixed_text[0]),
    data__text=('gone.jsonl',),
    eval__data=(str(mixed_text[0] / 'c.jsonl'),),
  )
  assert evaluate.run(cfg, str(tmp_path)) == 0
  assert list(seen) == ['c'] and len(seen['c'].documents('heldout')) == 30
  asked = toy_run.replaced(
    cfg, eval=dataclasses.replace(cfg.eval, data=('heldout',))
  )
  with pytest.raises(UserError, match=r"'gone\.jsonl' does not exist"):
    evaluate.run(asked, str(tmp_path))


def test_one_more_eval_keeps_the_others(session, monkeypatch, tmp_path):
  """A run's numbers stay, and it stays complete; another config's go."""
  cfg = toy_run.replaced(session.config, stages=('lm',), evals=('selection',))
  files.write_json(
    tmp_path / 'config.json', {'config': dataclasses.asdict(cfg)}
  )
  done = {
    'fingerprint': evaluate.fingerprint(cfg),
    'result_fingerprint': evaluate.result_fingerprint(cfg),
    'git': 'then',
    'corpus': 'text',
    'stages': {'lm': {}},
  }
  names = ('results.json', 'documents.json')
  for name, value in zip(names, ({'toy': 1}, {'toy': [1.0]}), strict=True):
    files.write_json(tmp_path / name, done | {'evals': {'selection': value}})
  monkeypatch.setattr(evaluate, '_stages_beside', lambda _: {'lm': 'there'})
  monkeypatch.setattr(evaluate.report, 'write', lambda *_: None)

  def evals_of(config):
    def run_evals(opened, paths, stop):
      (name,) = opened.config.evals
      context = surroundings(opened, {})
      context.documents[name] = {'toy': [2.0]}
      evaluate.write_documents(context)
      yield {name: {'toy': 2}}, [], {}

    monkeypatch.setattr(evaluate, 'run_evals', run_evals)
    evaluate.run(config, str(tmp_path))
    return [files.read_json(tmp_path / name) for name in names]

  evals_of(toy_run.replaced(cfg, evals=('copying',)))
  numbers, documents = evals_of(toy_run.replaced(cfg, evals=('qa',)))
  expected = {'selection': 1, 'copying': 2, 'qa': 2}
  assert numbers['evals'] == {e: {'toy': v} for e, v in expected.items()}
  assert documents['evals'] == {e: {'toy': [v]} for e, v in expected.items()}
  for key in ('fingerprint', 'git', 'corpus'):
    assert numbers[key] == documents[key] == done[key]
  assert list(numbers['added']) == ['copying', 'qa']
  assert evaluate.is_complete(cfg, tmp_path)
  other = toy_run.replaced(cfg, evals=('qa',), seed=1)
  numbers, documents = evals_of(other)
  assert numbers['evals'] == {'qa': {'toy': 2}} and not numbers['fingerprint']
  assert documents['fingerprint'] == evaluate.fingerprint(other)
  assert not evaluate.is_complete(cfg, tmp_path)


def test_an_eval_reads_a_run_beside_its_workdir(session, tmp_path):
  cfg = toy_run.replaced(session.config, init_from='@main/mixed')
  where = tmp_path / 'main' / 'checkpoints' / 'mixed'
  with pytest.raises(UserError, match=f'no checkpoint in {where}'):
    evaluate.run(cfg, str(tmp_path / 'measured'))


def test_an_eval_of_nothing_is_refused(session, tmp_path):
  cfg = session.config
  with pytest.raises(UserError, match='train first'):
    evaluate.run(toy_run.replaced(cfg, mesh=cfg.mesh), str(tmp_path))
  missing = os.path.join(tmp_path, 'mixed')
  with pytest.raises(UserError, match='there is no checkpoint in'):
    evaluate.run(toy_run.replaced(cfg, init_from=missing), str(tmp_path))
  assert not os.path.exists(tmp_path / 'results.json')


@pytest.fixture(scope='module')
def mixed_text(tmp_path_factory):
  """(folder, texts by file): two sources, and one that is only measured."""
  folder = tmp_path_factory.mktemp('mixed')
  rng = np.random.default_rng(0)
  texts = {}
  for name, letters in (('a', 'abcdef'), ('b', 'QRSTUV'), ('c', '012345')):
    texts[name] = [''.join(rng.choice(list(letters), 90)) for _ in range(30)]
    lines = [json.dumps({'text': text}) for text in texts[name]]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  return folder, texts


def open_mixed(mixed_text, *measured):
  folder, _ = mixed_text
  cfg = toy_run.config(
    toy_config.write_data(folder),
    data__text=tuple(str(folder / f'{name}.jsonl') for name in 'ab'),
    eval__data=measured,
  )
  opened = toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())
  return opened, evaluate._datasets(opened)


@pytest.mark.parametrize('data', [(), ('heldout',)])
def test_each_source_is_measured_on_its_own_documents(mixed_text, data):
  """By name, in the order of data.text; no window mixes two of them."""
  opened, datasets = open_mixed(mixed_text, *data)
  assert list(datasets) == ['a', 'b']
  for name, corpus in datasets.items():
    batch = windows_task.eval_windows(opened.config, corpus, C * K, 6, 500)
    ids = np.concatenate(
      [batch['chunks_BCK'].reshape(len(batch['doc_B']), -1),
       batch['output_BO']], 1
    )  # fmt: skip
    heldout = set(corpus.documents('heldout').tolist())
    assert set(batch['doc_B'].tolist()) == heldout
    for d, ids_T in zip(batch['doc_B'], ids, strict=True):
      text = corpus.document_text(d)
      assert text in mixed_text[1][name]
      assert bytes(ids_T.tolist()).decode() in text


def test_heldout_and_other_texts_are_measured_side_by_side(mixed_text):
  other = str(mixed_text[0] / 'c.jsonl')
  opened, datasets = open_mixed(mixed_text, 'heldout', other)
  assert list(datasets) == ['a', 'b', 'c']
  # All of a text that nothing is trained on, one side of the others.
  assert len(datasets['c'].documents('heldout')) == 30
  for name in 'ab':
    assert 0 < len(datasets[name].documents('heldout')) < 30
  total = sum(len(datasets[name].documents('heldout')) for name in 'ab')
  assert total == len(opened.corpus.documents('heldout'))


def test_a_text_and_its_heldout_side_are_two_data_sets(mixed_text):
  path = str(mixed_text[0] / 'a.jsonl')
  _, datasets = open_mixed(mixed_text, 'heldout', path)
  assert list(datasets) == [path, 'b', f'{path} (all)']
  sizes = [len(c.documents('heldout')) for c in datasets.values()]
  assert sizes[0] < sizes[2] == 30


def test_a_text_that_fails_leaves_the_others(session, params, monkeypatch):
  def run(context):
    (name,) = context.datasets
    if name == 'short':
      raise UserError('no document has 10 tokens')
    return {name: {'row': 1}}

  failing = EVALS['log_perplexity']._replace(run=run)
  monkeypatch.setitem(evaluate.EVALS, 'log_perplexity', failing)
  monkeypatch.setattr(evaluate, 'write_documents', lambda _: None)
  monkeypatch.setattr(
    evaluate, '_datasets', lambda _: dict.fromkeys(['short', 'long'])
  )
  monkeypatch.setattr(evaluate, '_loader', lambda *_: params.get)
  cfg = toy_run.replaced(session.config, evals=('log_perplexity',))
  ((evals, left_out, _),) = evaluate.run_evals(
    session._replace(config=cfg), {}, threading.Event()
  )
  assert evals == {'log_perplexity': {'long': {'row': 1}}}
  assert left_out == [
    'eval log_perplexity of short: left out, no document has 10 tokens'
  ]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'eval__data': ('gone.txt',)}, "'gone.txt' does not exist"),
    ({'evals': ('qa',), 'data__questions': ('gone.jsonl',)}, 'gone.jsonl cannot'),
    (
      {'stages': ('lm', 'sft'), 'stage__sft__init_from': 'x',
       'data__questions': ('no.jsonl',)},
      'no.jsonl cannot',
    ),
    (
      {'stages': ('lm', 'cpt_trained'), 'stage__cpt_trained__init_from': 'x',
       'stage__cpt_trained__context_length': 4000},
      'held-out documents',
    ),
    (
      {'evals': ('log_perplexity',), 'eval__output_lengths': (500,)},
      'eval log_perplexity: ',
    ),
    ({'evals': ('copying',), 'eval__copy_lengths': (900,)}, 'eval copying: '),
  ],
)  # fmt: skip
def test_what_the_end_lacks_is_found_before_the_first_step(
  tmp_path, monkeypatch, changes, message
):
  started = []
  monkeypatch.setattr(
    training, 'train_stage', lambda *args: started.append(args)
  )
  folder = toy_config.write_data(tmp_path)
  cfg = toy_run.config(
    folder,
    **{'stages': ('lm',), 'evals': ('log_perplexity',)} | changes,
  )
  with pytest.raises(UserError, match=message) as e:
    training.run(cfg, str(tmp_path / 'run'))
  assert not started
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('name', 'stage'),
  [('log_perplexity', 'cpt'), ('context_length', 'cpt'), ('passages', 'mixed')],
)
def test_an_eval_without_its_stages_config_is_refused(session, name, stage):
  stages = {k: v for k, v in session.config.stage.items() if k != stage}
  cfg = toy_run.replaced(
    session.config, stages=('lm',), stage=stages, evals=(name,)
  )
  with pytest.raises(UserError, match=rf'config\.stage\.{stage}, which is mis'):
    resolve.check(cfg)


def test_documents_trained_on_are_never_held_out(session, tmp_path):
  """More held out than then: some of it was trained on."""
  state = TrainState(
    np.int32(1), {'decoder': {'w': np.ones(2, np.float32)}}, {}
  )
  with checkpoint.open_manager(tmp_path / 'lm') as manager:
    checkpoint.save(manager, 1, state, {'heldout_fraction': 0.25}, 1.0)
  paths = {'lm': str(tmp_path / 'lm'), 'mixed': str(tmp_path / 'elsewhere')}
  of = lambda fraction: toy_run.replaced(
    session.config,
    data=dataclasses.replace(session.config.data, heldout_fraction=fraction),
  )
  for fraction in (0.1, 0.25):
    evaluate.check_split(of(fraction), paths)
  with pytest.raises(UserError, match='heldout_fraction=0.25, and with 0.9'):
    evaluate.check_split(of(0.9), paths)


def test_a_selector_that_cannot_be_is_said(session, params, windows, capsys):
  context = surroundings(session, {'mixed': params['mixed']})
  found = selection.scores(context, windows, 0)
  assert set(found) == {'random', 'last', 'oracle'}
  said = capsys.readouterr().out
  for name in ('rl', 'ppl_desc', 'ppl_asc'):
    assert f'selector {name}: left out, there is no ' in said
  assert len(context.left_out) == 3


def test_other_data_is_added_to_a_runs_results(session, monkeypatch, tmp_path):
  """Its own tables stay, of the same eval too, under whatever eval.*."""
  cfg = toy_run.replaced(session.config, stages=('lm',), evals=('copying',))
  files.write_json(
    tmp_path / 'config.json', {'config': dataclasses.asdict(cfg)}
  )
  done = {'fingerprint': evaluate.fingerprint(cfg), 'stages': {'lm': {}}}
  names = ('results.json', 'documents.json')
  for name, value in zip(names, ({'toy': 1}, {'toy': [1.0]}), strict=True):
    files.write_json(tmp_path / name, done | {'evals': {'copying': value}})
  monkeypatch.setattr(evaluate, '_stages_beside', lambda _: {'lm': 'there'})
  monkeypatch.setattr(evaluate.report, 'write', lambda *_: None)

  def run_evals(opened, paths, stop):
    context = surroundings(opened, {})._replace(datasets={})
    context.documents['copying'] = {'other': [2.0]}
    evaluate.write_documents(context)
    yield {'copying': {'other': 2}}, [], {}

  monkeypatch.setattr(evaluate, 'run_evals', run_evals)
  (tmp_path / 'other.txt').write_text('Other words. ' * 900)
  data = dataclasses.replace(
    cfg.eval, data=(str(tmp_path / 'other.txt'),), num_windows=3
  )
  evaluate.run(toy_run.replaced(cfg, eval=data), str(tmp_path))
  numbers, documents = (files.read_json(tmp_path / name) for name in names)
  assert numbers['evals'] == {'copying': {'toy': 1, 'other': 2}}
  assert documents['evals'] == {'copying': {'toy': [1], 'other': [2]}}
  assert numbers['fingerprint'] == evaluate.fingerprint(cfg)


def test_a_mean_that_is_not_finite_is_a_cell_like_any(tmp_path):
  """Of an overflowed decoder: said, and the page is written."""
  nan_W, doc_W = np.array([np.nan, 1.0, 2.0]), np.arange(3)
  row = {'P1': nan_W}
  table = common.table(
    {'refrag_k8': row, 'no_context_trained': {'P1': doc_W + 1.0}},
    doc_W,
    ['no_context_trained'],
    {'doc': [], 'rows': {}},
    1.4,
  )
  assert table['refrag_k8']['P1'] == {'mean': None, 'se': None, 'n': 3}
  point = dict(selector='rl', p=0.5, rate=2.0, expanded=1)
  evals = {
    'log_perplexity': {'toy': table},
    'selection': {'toy': [point | {'nll': results.stat(nan_W)}]},
  }
  files.write_json(tmp_path / 'results.json', {'evals': evals})
  report.write(str(tmp_path), EVALS)
  html = (tmp_path / 'report.html').read_text()
  assert html.count('not finite') >= 2


def test_texts_of_one_name_go_by_their_paths(mixed_text):
  folder, texts = mixed_text
  (folder / 'more').mkdir()
  same = folder / 'more' / 'a.jsonl'
  same.write_text('\n'.join(json.dumps({'text': t}) for t in texts['c']))
  _, datasets = open_mixed(mixed_text, 'heldout', str(same))
  assert list(datasets) == [str(folder / 'a.jsonl'), 'b', str(same)]
  # What tfds ends in is a version.
  name = 'tfds:/data/texts/1.0.0'
  assert evaluate._dataset_name(name) == name


def test_complete_means_of_this_config(session, tmp_path):
  cfg = toy_run.replaced(session.config, stages=('lm',), evals=('selection',))
  done = {
    'fingerprint': evaluate.fingerprint(cfg),
    'stages': {'lm': {}},
    'evals': {'selection': {}},
  }
  path = tmp_path / 'results.json'
  assert not evaluate.is_complete(cfg, tmp_path)
  files.write_json(path, done)
  assert evaluate.is_complete(cfg, tmp_path)
  assert not evaluate.is_complete(toy_run.replaced(cfg, seed=1), tmp_path)
  mesh = dataclasses.replace(cfg.mesh, data=1, fsdp=4)
  model = dataclasses.replace(cfg.model, remat='full', loss_block=2)
  moved = toy_run.replaced(cfg, mesh=mesh, model=model)
  assert evaluate.is_complete(moved, tmp_path)
  model = dataclasses.replace(cfg.model, chunk_size=cfg.model.chunk_size * 2)
  moved = toy_run.replaced(cfg, model=model)
  assert not evaluate.is_complete(moved, tmp_path)
  files.write_json(path, done | {'evals': {}})
  assert not evaluate.is_complete(cfg, tmp_path)
  files.write_json(path, done | {'stages': {}})
  assert not evaluate.is_complete(cfg, tmp_path)
