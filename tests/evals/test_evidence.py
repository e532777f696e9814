"""The evals copying, context_length, passages and details, by hand.

Dimension key: W windows, P passages, C chunks, O outputs, S tokens of a span,
T row length.
"""

import dataclasses
import functools
import threading
import types

import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import results
from refrag_jax.data import batch as batch_lib
from refrag_jax.data import tokenizers
from refrag_jax.data.tasks import windows as windows_task
from refrag_jax.data.text import corpus as corpus_lib
from refrag_jax.evals import (
  EVALS,
  common,
  context_length,
  copying,
  details,
  passages,
  selection,
)
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.stages import lm

K, C, O, W = 4, 4, 6, 16  # of toy_config.py
BYTES = tokenizers.load('bytes')
SELECTORS = ('rl', 'ppl_desc', 'ppl_asc', 'random', 'last', 'oracle')


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
  # With CEPE's pieces in the windows, which these evals must not trip over.
  cfg = toy_run.config(folder, model__piece_length=4)
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


@pytest.fixture(scope='module')
def params(session):
  """role -> random parameters, other ones for each."""
  init = jax.jit(lambda key: init_params(session.config.model, key))
  out = {}
  for i, role in enumerate(('before', 'trained', 'mixed', 'cpt', 'policy')):
    out[role] = init(jax.random.key(i))
    kernel = out[role]['policy']['score']['kernel']
    noise = jax.random.normal(jax.random.key(i), kernel.shape)
    out[role]['policy']['score']['kernel'] = noise
  return out


@pytest.fixture(scope='module')
def context(session, params):
  return surroundings(session, params)


def surroundings(session, params, corpus=None):
  datasets = {'toy': corpus or session.corpus}
  return common.Context(
    session, params.get, datasets, threading.Event(), {}, {}, []
  )


@pytest.fixture(scope='module')
def tables(context):
  """Each eval, run once."""

  @functools.cache
  def run(name):
    return EVALS[name].run(context)['toy']

  return run


@pytest.fixture(scope='module')
def windows(session):
  """What `passages` and `details` cut: the longest output, C chunks."""
  return windows_task.eval_windows(session.config, session.corpus, C * K, O, W)


@functools.cache
def plain_lm(model):
  return jax.jit(functools.partial(lm.nll, model, variant=None))


def lm_nll(session, params, tokens_WT):
  """NLL of every token but BOS by plain language modelling, (W, T)."""
  tokens_WT = np.pad(tokens_WT, ((0, 0), (1, 0)), constant_values=BYTES.bos_id)
  positions_WT = np.broadcast_to(np.arange(tokens_WT.shape[1]), tokens_WT.shape)
  batch = {
    'tokens_BT': tokens_WT,
    'segment_ids_BT': np.ones_like(tokens_WT),
    'positions_BT': positions_WT,
  }
  return np.asarray(plain_lm(session.model)(params, batch)[0])


@functools.cache
def compressed(model):
  return jax.jit(functools.partial(forward.compressed_nll, model))


@functools.cache
def expanded(model, draws: int):
  """NLL with chosen chunks expanded: f(params, batch, expand_BC)."""

  @jax.jit
  def run(params, batch, expand_BC):
    c_BCE = forward.chunk_vectors(model, params, batch)
    return forward.output_nll(model, params, batch, c_BCE, expand_BC, draws)

  return run


def mean_of(values_W, doc_W) -> float:
  return results.by_document(np.asarray(values_W), doc_W).mean()


def config_with(session, **fields):
  evals = dataclasses.replace(session.config.eval, **fields)
  return session._replace(config=toy_run.replaced(session.config, eval=evals))


# --- copying ----------------------------------------------------------------


def test_spans_are_tokens_of_their_document_in_another_order(session):
  corpus = session.corpus
  doc_W, span_WS = copying.spans(corpus, 40, 30)
  assert span_WS.shape == (30, 40)
  assert set(doc_W.tolist()) == set(corpus.documents('heldout').tolist())
  for d, span_S in zip(doc_W, span_WS, strict=True):
    text = corpus.document_text(d).encode()
    counts = np.bincount(span_S, minlength=256)
    assert (counts <= np.bincount(list(text), minlength=256)).all()
    assert bytes(span_S.tolist()) not in text
    assert bytes(span_S[:8].tolist()) not in text
  again_W, again_WS = copying.spans(corpus, 40, 30)
  np.testing.assert_array_equal(again_WS, span_WS)
  np.testing.assert_array_equal(again_W, doc_W)
  # Two windows of a document have spans of their own.
  twins = [w for w in range(30) if doc_W[w] == doc_W[0]]
  assert len(twins) > 1
  assert (span_WS[twins[0]] != span_WS[twins[1]]).any()


def test_copying_is_plain_language_modelling_of_a_span_twice(
  session, params, tables
):
  rows = tables('copying')
  assert rows.keys() == {'first', 'second', 'first_trained', 'second_trained'}
  doc_W, span_WS = copying.spans(session.corpus, 8, W)
  for role, suffix in (('before', ''), ('trained', '_trained')):
    for n in (4, 8):
      twice_WT = np.tile(span_WS[:, :n], 2)
      nll_WT = lm_nll(session, params[role], twice_WT)
      first, second = rows[f'first{suffix}'], rows[f'second{suffix}']
      expected = mean_of(nll_WT[:, :n].mean(1), doc_W)
      np.testing.assert_allclose(first[f'P{n}']['mean'], expected, rtol=1e-5)
      expected = mean_of(nll_WT[:, n:].mean(1), doc_W)
      np.testing.assert_allclose(second[f'P{n}']['mean'], expected, rtol=1e-5)
      gain = second['vs'][f'first{suffix}'][f'P{n}']
      np.testing.assert_allclose(
        gain['mean'], second[f'P{n}']['mean'] - first[f'P{n}']['mean'], 1e-4
      )
      assert gain['n'] == len(set(doc_W.tolist()))
  assert copying.run(surroundings(session, {})) == {}


# --- context_length ---------------------------------------------------------


def test_all_lengths_predict_the_same_from_the_last_tokens(
  session, params, tables
):
  rows = tables('context_length')
  expected = {'no_context_trained'}
  for s in (8, 32):
    expected |= {f'refrag_k4_s{s}', f'refrag_k4_s{s}_shuffled'}
    expected |= {f'full_context_trained_s{s}', f'last_k_trained_s{s}'}
  assert rows.keys() == expected
  whole = windows_task.eval_windows(session.config, session.corpus, 32, O, W)
  doc_W, output_WO = whole['doc_B'], whole['output_BO']
  text_WT = whole['chunks_BCK'].reshape(W, 32)
  chunks = ('chunks_BCK', 'chunk_len_BC', 'encoder_BCM', 'encoder_len_BC')
  other_W = common.other_document(doc_W)
  for s in (8, 32):
    cut = whole | {key: whole[key][:, 8 - s // K :] for key in chunks}
    swapped = cut | {key: cut[key][other_W] for key in chunks}
    model = session.model
    for row, nll_WO in {
      f'refrag_k4_s{s}': compressed(model)(params['mixed'], cut),
      f'refrag_k4_s{s}_shuffled': compressed(model)(params['mixed'], swapped),
      f'full_context_trained_s{s}': lm_nll(
        session,
        params['trained'],
        np.concatenate([text_WT[:, 32 - s :], output_WO], 1),
      )[:, s:],
      f'last_k_trained_s{s}': lm_nll(
        session,
        params['trained'],
        np.concatenate([text_WT[:, 32 - s // K :], output_WO], 1),
      )[:, s // K :],
      'no_context_trained': lm_nll(session, params['trained'], output_WO),
    }.items():
      for n in (3, 6):
        mean = mean_of(np.asarray(nll_WO)[:, :n].mean(1), doc_W)
        np.testing.assert_allclose(
          rows[row][f'P{n}']['mean'], mean, rtol=1e-5, err_msg=row
        )
  assert rows['refrag_k4_s32']['vs'].keys() == expected - {'refrag_k4_s32'}


@pytest.fixture
def lengths_only(monkeypatch):
  """`context_length` without a model."""

  def measure(context, windows):
    return {'refrag_k4_s8': np.zeros(windows['output_BO'].shape)}

  monkeypatch.setattr(context_length, 'measure', measure)


def test_short_documents_drop_out_and_n_says_so(session, lengths_only):
  corpus = session.corpus
  size_D = np.diff(corpus.token_offsets)[corpus.documents('heldout')]
  s = (int(np.median(size_D)) - O) // K * K
  long = int((size_D >= s + O).sum())
  assert 2 <= long < len(size_D)
  some = config_with(session, context_lengths=(8, s), context_windows=500)
  out = context_length.run(surroundings(some, {}))['toy']
  assert out['refrag_k4_s8']['P6']['n'] == long
  # None is long enough: the data set is left out, the others are not.
  far = config_with(session, context_lengths=(8, 400))
  assert context_length.run(surroundings(far, {})) == {}


def test_no_lengths_and_no_weights_give_no_table(session):
  none = config_with(session, context_lengths=())
  assert context_length.run(surroundings(none, {})) == {}
  assert context_length.run(surroundings(session, {})) == {}


@pytest.mark.parametrize(
  ('length', 'rows'), [(16, 8), (8, 8), (32, 4), (64, 2), (128, 1), (4096, 1)]
)
def test_longer_contexts_come_in_smaller_batches(session, length, rows):
  """`cpt` has 16 tokens, a batch of the config 8 rows."""
  assert context_length.batch_rows(session.config, length) == rows


def test_each_length_is_measured_in_its_own_batches(
  context, session, monkeypatch
):
  seen = set()

  def plain(context, role, windows, kind, rows=0):
    seen.add((role, kind, windows['chunks_BCK'].shape[1], rows))
    return np.zeros((W, O))

  def selected(context, role, windows, score_WC, draws, tail=0, rows=0):
    seen.add((role, draws, score_WC.shape[1], rows))
    return np.zeros((W, O))

  monkeypatch.setattr(context_length.perplexity, 'plain_nll', plain)
  monkeypatch.setattr(selection, 'selected_nll', selected)
  whole = windows_task.eval_windows(session.config, session.corpus, 32, O, W)
  context_length.measure(context, whole)
  assert seen == {
    ('trained', 'none', 8, 0),
    *{('trained', kind, 2, 8) for kind in ('full', 'last_k')},
    *{('trained', kind, 8, 4) for kind in ('full', 'last_k')},
    ('mixed', 0, 2, 8),
    ('mixed', 0, 8, 4),
  }


def test_beyond_its_positions_a_decoder_reads_the_last_tokens(
  context, session, params
):
  """Of 24 positions one is BOS's and 6 are the output's: 4 chunks of 4."""
  decoder = dataclasses.replace(session.config.model.decoder, max_length=24)
  model = dataclasses.replace(session.config.model, decoder=decoder)
  config = dataclasses.replace(session.config, model=model)
  few = context._replace(session=session._replace(config=config), memo={})
  whole = windows_task.eval_windows(config, session.corpus, 32, O, W)
  rows = context_length.measure(few, whole)
  text_WT = whole['chunks_BCK'].reshape(W, 32)
  tokens_WT = np.concatenate([text_WT[:, 16:], whole['output_BO']], 1)
  for role, suffix in (('before', ''), ('trained', '_trained')):
    nll_WO = lm_nll(session, params[role], tokens_WT)[:, 16:]
    found = rows.pop(f'last_16_tokens{suffix}')
    np.testing.assert_allclose(found, nll_WO, rtol=1e-4)
  # The others are as they were, by their own decoder.
  plain = context_length.measure(
    context._replace(session=session, memo={}), whole
  )
  assert rows.keys() == plain.keys()
  for row, nll_WO in plain.items():
    np.testing.assert_allclose(rows[row], nll_WO, rtol=1e-5, err_msg=row)
  assert context_length.held_tokens(session.config) == 32


def test_full_context_ends_at_a_multiple_of_the_trained_length(
  context, session, monkeypatch
):
  """`cpt` has 16 tokens: 64 are measured, 68 are not."""
  zeros = lambda *_, **__: np.zeros((W, O))
  monkeypatch.setattr(context_length.perplexity, 'plain_nll', zeros)
  monkeypatch.setattr(selection, 'selected_nll', zeros)
  monkeypatch.setattr(
    context_length.batch, 'cut_chunks', lambda whole, _: whole
  )
  whole = windows_task.eval_windows(session.config, session.corpus, 32, O, W)
  longer = config_with(session, context_lengths=(64, 68))
  rows = context_length.measure(context._replace(session=longer), whole)
  assert {row for row in rows if row.startswith('full')} == {
    'full_context_trained_s64'
  }
  assert {'last_k_trained_s68', 'refrag_k4_s68'} <= rows.keys()


# --- passages ---------------------------------------------------------------


@pytest.mark.parametrize('num', [2, 3, 5])
def test_passages_are_of_other_documents_and_one_is_the_own(num):
  doc_W = np.repeat([3, 5, 8, 9, 20], 40)
  source_WP, place_W = passages.places(doc_W, num)
  assert source_WP.shape == (200, num)
  rows = np.arange(200)
  np.testing.assert_array_equal(source_WP[rows, place_W], rows)
  for w in rows:
    assert len(set(doc_W[source_WP[w]])) == num
  # Every place is as good as any other, whatever the document.
  share = np.bincount(place_W, minlength=num) / 200
  assert (abs(share - 1 / num) < 0.12).all()
  again, _ = passages.places(doc_W, num)
  np.testing.assert_array_equal(again, source_WP)
  other, _ = passages.places(doc_W, num, seed=1)
  assert (other != source_WP).any()


def test_too_few_documents_come_twice_but_never_the_own(session):
  doc_W = np.array([1, 1, 4])
  source_WP, place_W = passages.places(doc_W, 4)
  for w in range(3):
    others = np.delete(source_WP[w], place_W[w])
    assert (doc_W[others] != doc_W[w]).all()


def joined_windows(session, P=2):
  """As `passages` makes them: P passages in four chunks, and their places."""
  length = C // P * K
  base = windows_task.eval_windows(session.config, session.corpus, length, O, W)
  source_WP, place_W = passages.places(base['doc_B'], P)
  return batch_lib.side_by_side(base, source_WP), place_W


def test_the_useful_passage_stands_before_the_output_in_its_document(session):
  joined, place_W = joined_windows(session)
  assert joined['chunks_BCK'].shape == (W, C, K)
  text = lambda ids: bytes(i for i in ids.ravel().tolist() if i < 256)
  for w, place in enumerate(place_W):
    document = session.corpus.document_text(int(joined['doc_B'][w])).encode()
    useful = joined['chunks_BCK'][w].reshape(2, -1)[place]
    assert text(useful) + text(joined['output_BO'][w]) in document
    # Each passage is whole chunks: the encoder reads what the decoder would.
    for c in range(C):
      np.testing.assert_array_equal(
        joined['encoder_BCM'][w, c, 1 : 1 + K], joined['chunks_BCK'][w, c]
      )
  assert 0 < place_W.mean() < 1
  # The other one stands before another document's output.
  base = windows_task.eval_windows(session.config, session.corpus, 2 * K, O, W)
  source_WP, _ = passages.places(base['doc_B'], 2)
  for w in range(W):
    other = source_WP[w, 1 - place_W[w]]
    np.testing.assert_array_equal(
      joined['chunks_BCK'][w].reshape(2, 2, K)[1 - place_W[w]],
      base['chunks_BCK'][other],
    )
    assert base['doc_B'][other] != joined['doc_B'][w]
  assert 'piece_BPM' not in joined


def test_passages_rows(session, params, context, tables):
  rows = tables('passages')
  names = [*SELECTORS, 'useful']
  assert rows.keys() == {'none', 'chance'} | {
    f'{name}_p{p}' for name in names for p in ('0.25', '0.5')
  }
  joined, place_W = joined_windows(session)
  doc_W = joined['doc_B']
  means = {
    row: {key: stat['mean'] for key, stat in columns.items() if key != 'vs'}
    for row, columns in rows.items()
  }
  assert means['chance'] == {'hit': 0.5}
  assert means['none'].keys() == {'nll'}
  for name in names:
    for p in ('0.25', '0.5'):
      assert 0 <= means[f'{name}_p{p}']['hit'] <= 1
      assert {'none', 'chance', f'random_p{p}', f'last_p{p}'} - {
        f'{name}_p{p}'
      } <= rows[f'{name}_p{p}']['vs'].keys()
  hit = rows['rl_p0.25']['vs']['chance']['hit']['mean']
  np.testing.assert_allclose(hit, means['rl_p0.25']['hit'] - 0.5)
  # The last chunks are those of the second passage.
  for p in ('0.25', '0.5'):
    np.testing.assert_allclose(
      means[f'last_p{p}']['hit'], mean_of(place_W == 1, doc_W)
    )
    assert means[f'useful_p{p}']['hit'] == 1
  model, policy = session.model, params['policy']
  c = np.arange(C)
  end_W1 = 2 * place_W[:, None] + 1
  for row, draws, expand_WC in (
    ('none', 0, np.zeros((W, C), bool)),
    ('useful_p0.25', 1, c == end_W1),
    ('useful_p0.5', 2, (c == end_W1) | (c == end_W1 - 1)),
    ('last_p0.25', 1, np.broadcast_to(c == 3, (W, C))),
  ):
    nll_WO = expanded(model, draws)(policy, joined, expand_WC)
    np.testing.assert_allclose(
      means[row]['nll'], mean_of(nll_WO.mean(1), doc_W), rtol=1e-5
    )
  # The choices of the policy, counted by hand.
  scores = np.asarray(selection.scores(context, joined, 0)['rl'])
  best_W = scores.argmax(1)
  np.testing.assert_allclose(
    means['rl_p0.25']['hit'], mean_of(best_W // 2 == place_W, doc_W)
  )
  kept = context.documents_of('passages', 'toy')['windows']
  np.testing.assert_array_equal(kept['place'], place_W)
  np.testing.assert_array_equal(kept['doc'], doc_W)


def test_no_more_than_the_useful_passage_is_expanded(session, params):
  """p = 0.75 of four chunks is three, each of four passages has one."""
  some = config_with(
    session, num_passages=4, expand_fractions=(0.75,), selectors=('last',)
  )
  rows = passages.run(surroundings(some, params))['toy']
  assert rows.keys() == {'none', 'chance', 'last_p0.75', 'useful_p0.75'}
  assert rows['useful_p0.75']['hit']['mean'] == 1
  joined, place_W = joined_windows(session, 4)
  doc_W = joined['doc_B']
  expand_WC = np.arange(C) == place_W[:, None]
  nll_WO = expanded(session.model, 1)(params['policy'], joined, expand_WC)
  np.testing.assert_allclose(
    rows['useful_p0.75']['nll']['mean'], mean_of(nll_WO.mean(1), doc_W), 1e-5
  )
  # One of the last three chunks is useful, but for the first place.
  np.testing.assert_allclose(
    rows['last_p0.75']['hit']['mean'], mean_of((place_W > 0) / 3, doc_W)
  )
  assert rows['chance']['hit']['mean'] == 0.25


def test_passages_may_be_skipped(session, params):
  none = config_with(session, num_passages=0)
  assert passages.run(surroundings(none, params)) == {}
  assert passages.run(surroundings(session, {})) == {}
  one = dataclasses.replace(
    session.corpus, heldout=np.arange(len(session.corpus.source)) == 0
  )
  assert passages.run(surroundings(session, params, one)) == {}


# --- details ----------------------------------------------------------------


def test_details_by_output_and_by_distance(session, params, tables, windows):
  rows = tables('details')
  assert rows.keys() == {
    'refrag_k4', 'refrag_k4_shuffled', 'no_context_trained', 'expand_one_gain',
  }  # fmt: skip
  doc_W, model = windows['doc_B'], session.model
  none_WO = np.asarray(compressed(model)(params['policy'], windows))
  trained_WO = lm_nll(session, params['trained'], windows['output_BO'])
  assert rows['refrag_k4'].keys() == {f'o{i}' for i in range(1, 7)} | {'vs'}
  for i in range(O):
    column = f'o{i + 1}'
    mean = mean_of(none_WO[:, i], doc_W)
    np.testing.assert_allclose(rows['refrag_k4'][column]['mean'], mean, 1e-5)
    gain = rows['refrag_k4']['vs']['no_context_trained'][column]['mean']
    expected = mean_of(none_WO[:, i] - trained_WO[:, i], doc_W)
    np.testing.assert_allclose(gain, expected, rtol=1e-4, atol=1e-5)
    assert column in rows['refrag_k4']['vs']['refrag_k4_shuffled']
  gains = rows['expand_one_gain']
  assert gains.keys() == {'d1', 'd2', 'd3', 'd4', 'vs'}
  for d in range(1, 5):
    expand_WC = np.broadcast_to(np.arange(C) == C - d, (W, C))
    nll_WO = expanded(model, 1)(params['policy'], windows, expand_WC)
    gain_W = none_WO.mean(1) - np.asarray(nll_WO).mean(1)
    np.testing.assert_allclose(
      gains[f'd{d}']['mean'], mean_of(gain_W, doc_W), rtol=1e-3, atol=1e-6
    )


TEXT = 'é1234 foo_bar x2 12 __init__ camelCase Word a_ 567é890 ABC_D'


def found(kind, starts=None):
  """The spans of TEXT as (first token, tokens); bytes are tokens by default."""
  data = TEXT.encode()
  if starts is None:
    starts = BYTES.encode(TEXT)[1]
    starts = np.array([len(TEXT[:s].encode()) for s in starts])
  corpus = types.SimpleNamespace(
    text=np.frombuffer(data, np.uint8),
    text_offsets=np.array([0, 0, len(data)]),
    starts=np.asarray(starts),
    token_offsets=np.array([0, 0, len(starts)]),
  )
  spans = details.find(corpus, np.array([0, 1]), details.SPANS[kind])
  assert set(spans.doc.tolist()) <= {1}
  return list(zip(spans.first.tolist(), spans.size.tolist(), strict=True))


def test_spans_by_hand():
  data = TEXT.encode()
  at = lambda text: (data.index(text.encode()), len(text))
  assert found('digits') == [at('1234'), at('567'), at('890')]
  words = ('foo_bar', '__init__', 'camelCase', 'a_', 'ABC_D')
  assert found('identifiers') == [at(word) for word in words]


def test_spans_are_all_the_tokens_that_they_touch():
  """Tokens of five bytes: 'é123', '4 foo', '_bar ', ..."""
  starts = np.arange(0, len(TEXT.encode()), 5)
  assert found('digits', starts)[0] == (0, 2)  # bytes 2 to 5
  assert found('identifiers', starts)[0] == (1, 2)  # bytes 7 to 13


@pytest.fixture(scope='module')
def numbers(tmp_path_factory):
  """Documents of numbers of 3, 4 and 5 digits, that count up or nearly."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp('numbers')
  lines = []
  for i in range(24):
    words = ''
    for size in 4 * (3, 4, 5):
      digits = 48 + np.arange(size)
      if rng.random() < 0.4:
        digits[rng.integers(1, size)] = 57
      words += f' /{bytes(digits.tolist()).decode()} and'  # '/' is before '0'
    lines.append(f'{{"text": "{i}{words}"}}')
  path = folder / 'text.jsonl'
  path.write_text('\n'.join(lines))
  return corpus_lib.prepare([str(path)], [1.0], BYTES, str(folder / 'c'), 1.0)


@pytest.mark.parametrize('length', [4, 16])
def test_windows_hold_their_span_whole(numbers, length):
  docs = numbers.documents('heldout')
  every = details.find(numbers, docs, details.SPANS['digits'])
  spans, start_W = details.around(numbers, every, length, 100)
  assert len(start_W) == 100
  assert set(spans.doc.tolist()) == set(docs.tolist())
  assert (np.bincount(spans.doc) >= 4).all()  # by turns
  assert (start_W >= 0).all() and (start_W <= spans.first).all()
  assert (spans.first + spans.size <= start_W + length).all()
  size_W = np.diff(numbers.token_offsets)[spans.doc]
  assert (start_W + length <= size_W).all()
  chosen = set(zip(spans.doc.tolist(), spans.first.tolist(), strict=True))
  assert len(chosen) == 100
  # Anywhere in the window.
  place_W = spans.first - start_W
  assert len(set(place_W[spans.size == 3].tolist())) >= min(2, length - 3)
  few, _ = details.around(numbers, every, length, 5)
  assert len(set(few.doc.tolist())) == 5


def test_windows_of_spans_reach_the_ends_of_a_document():
  """A document of 6 tokens, a span at either end; another one is too long."""
  corpus = types.SimpleNamespace(token_offsets=np.array([0, 6]))
  spans = details.Spans(
    np.zeros(3, int), np.array([0, 4, 1]), np.array([2, 2, 5])
  )
  chosen, start_W = details.around(corpus, spans, 4, 10)
  assert chosen.first.tolist() == [0, 4]
  assert start_W.tolist() == [0, 2]
  chosen, start_W = details.around(corpus, spans, 7, 10)  # longer than the text
  assert len(chosen.doc) == len(start_W) == 0


def test_exactness_of_a_decoder_that_counts(session, numbers):
  """It predicts the id after the current one, so what is exact is known."""
  cfg = dataclasses.replace(session.config.model.decoder, tie_embeddings=False)
  model_cfg = dataclasses.replace(
    session.config.model, decoder=cfg, piece_length=0
  )
  counting = config_with(session, num_windows=60, reconstruct_lengths=(16,))
  counting = counting._replace(
    config=toy_run.replaced(counting.config, model=model_cfg),
    model=type(session.model)(model_cfg),
  )
  params = jax.jit(lambda key: init_params(model_cfg, key))(jax.random.key(0))
  decoder = params['decoder']
  # Nothing is added to an embedding on its way, and each one's own direction
  # is the likeliest in the column after it.
  for name in ('o_proj', 'down_proj'):
    layer = decoder['layers'][name]
    decoder['layers'][name] = jax.tree.map(jnp.zeros_like, layer)
  embed_VD = decoder['embed_tokens']
  embed_VD /= jnp.linalg.norm(embed_VD, axis=1, keepdims=True)
  decoder['embed_tokens'] = embed_VD
  decoder['lm_head'] = jnp.roll(embed_VD, 1, axis=0).T
  context = surroundings(counting, {'reconstruct': params}, numbers)
  rows = details.run(context)['toy']
  whiches = ('compressed', 'expanded', 'shuffled')
  # No identifiers, no weights for the rest.
  assert rows.keys() == {f'digits_P16_{which}' for which in whiches}
  every = details.find(
    numbers, numbers.documents('heldout'), details.SPANS['digits']
  )
  spans, start_W = details.around(numbers, every, 16, 60)
  exact_W = []
  for d, first, size, start in zip(*spans, start_W, strict=True):
    text = numbers.document_text(d).encode()
    counts = all(text[i] == text[i - 1] + 1 for i in range(first, first + size))
    # At the window's first token nothing stands before but the context.
    exact_W.append(counts and first > start)
  expected = mean_of(np.array(exact_W, float), spans.doc)
  assert 0.2 < expected < 0.8
  for which in whiches:
    stat = rows[f'digits_P16_{which}']['exact']
    np.testing.assert_allclose(stat['mean'], expected)
    assert stat['n'] == len(set(spans.doc.tolist()))
  kept = context.documents_of('details_digits_P16', 'toy')
  np.testing.assert_array_equal(kept['doc'], np.unique(spans.doc))


def test_what_stands_before_an_exact_span(
  session, params, numbers, monkeypatch
):
  """Its own chunks' vectors, its own tokens, another document's vectors."""
  seen = []

  def states(model, batch, c_BCE, expand_BC, num_expanded):
    del model
    seen.append((batch, c_BCE is None, num_expanded))
    return jnp.zeros((*batch['output_BO'].shape, 16))

  monkeypatch.setattr(Refrag, 'output_states', states)
  monkeypatch.setattr(
    common,
    'map_batches',
    lambda context, run, data, rows=0: np.asarray(run(data)),
  )
  some = config_with(session, reconstruct_lengths=(16,))
  context = surroundings(some, {'reconstruct': params['mixed']}, numbers)
  with jax.disable_jit():
    details.run(context)
  own, tokens, other = seen
  assert (own[1:], tokens[1:], other[1:]) == ((False, 0), (True, 4), (False, 0))
  for batch, *_ in (own, tokens):
    np.testing.assert_array_equal(
      batch['chunks_BCK'].reshape(-1, 16), batch['output_BO']
    )
  np.testing.assert_array_equal(own[0]['output_BO'], other[0]['output_BO'])
  differ_W = (own[0]['encoder_BCM'] != other[0]['encoder_BCM']).any((1, 2))
  assert differ_W.all()
