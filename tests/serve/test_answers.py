"""Questions to answers: as in training, alone or together, in pieces or whole.

Dimension key: C chunks of all passages.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import generate
from refrag_jax.data import passages as passages_lib
from refrag_jax.data import tokenizers
from refrag_jax.data.tasks import questions
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import Refrag as Model
from refrag_jax.models.refrag import init_params
from refrag_jax.serve import expansion, requests
from refrag_jax.serve.answers import Refrag
from refrag_jax.serve.text import Writer

GROUPS = ('decoder', 'encoder', 'projection', 'policy')
PASSAGES = ['the chunk encoder', {'text': 'a policy reward', 'title': 'T'}]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  toy_config.write_data(folder)
  return toy_run.config(str(folder))


@pytest.fixture(scope='module')
def params(config):
  return jax.jit(lambda: init_params(config.model, jax.random.key(0)))()


@pytest.fixture(scope='module')
def model(config, params):
  return Refrag(
    config,
    params,
    GROUPS,
    toy_run.mesh(),
    pools=[(3, 128)],
    max_chunks=16,
  )


@pytest.fixture(scope='module')
def logits_of(config, params):
  """The decoder's logits behind each of some ids, (T, V)."""
  decoder = Model(config.model)

  def of(ids):
    hidden_1TD, _ = decoder.apply(
      {'params': params}, np.array([ids], np.int32),
      method=lambda self, ids: self.decoder(
        self.decoder.embed(ids), np.arange(ids.shape[1])[None]
      ),
    )  # fmt: skip
    return hidden_1TD[0] @ decoder.apply({'params': params}, method=Model.head)

  return of


def test_a_request_is_cut_as_in_training(config, model):
  """Prefix, chunks, encoder ids and what is given, by the batch's arrays."""
  source = questions.build(config, 'heldout')
  batch = source.examples('given', 4)
  for row, number in enumerate(batch['id_B']):
    question = source.questions[number]
    texts = [source.passages[p] for p in question.given[:2]]
    asked = model.read(
      question.question, [passages_lib.Passage(b, a) for a, b in texts]
    )
    there_C = batch['chunk_len_BC'][row] > 0
    cut = [
      c
      for c, place in enumerate(asked.passage_C)
      if c - np.searchsorted(asked.passage_C, place)
      < config.data.passage_chunks
    ]
    for ours, theirs in (
      ('chunks_CK', 'chunks_BCK'),
      ('chunk_len_C', 'chunk_len_BC'),
      ('encoder_CM', 'encoder_BCM'),
      ('encoder_len_C', 'encoder_len_BC'),
    ):
      np.testing.assert_array_equal(
        getattr(asked, ours)[cut], batch[theirs][row][there_C]
      )
    length = batch['prefix_len_B'][row]
    # A question too long for training's slots is whole here.
    np.testing.assert_array_equal(
      asked.prefix[-min(length, 8) :], batch['prefix_BQ'][row][:length][-8:]
    )
    given = batch['loss_mask_BO'][row].argmax()
    np.testing.assert_array_equal(asked.given, batch['output_BO'][row][:given])
    whole = [model.read._shown(p) for p in asked.passages]
    assert ''.join(asked.text_C) == ''.join(whole)


def test_an_answer_is_what_the_evals_would_write(config, params, model):
  answer = model.answer('what?', PASSAGES, max_tokens=6)
  asked = model.read('what?', PASSAGES)
  batch = {
    'prefix_BQ': asked.prefix[None],
    'prefix_len_B': np.array([len(asked.prefix)]),
    'chunks_BCK': asked.chunks_CK[None],
    'chunk_len_BC': asked.chunk_len_C[None],
    'encoder_BCM': asked.encoder_CM[None],
    'encoder_len_BC': asked.encoder_len_C[None],
    'output_BO': asked.given[None],
    'output_len_B': np.array([len(asked.given)]),
  }
  C = len(asked.chunk_len_C)
  eos_id = tokenizers.load('bytes').eos_id

  @jax.jit
  def expected(params, batch):
    e_BCD = Model(config.model).apply(
      {'params': params}, batch, method=Model.project_chunks
    )
    return generate.greedy(
      Model(config.model), params, batch, e_BCD, np.zeros((1, C), bool), 0, 6,
      eos_id,
    )  # fmt: skip

  (ids,) = expected(params, batch).tolist()
  end = ids.index(eos_id) + 1 if eos_id in ids else 6
  assert list(answer.tokens) == ids[:end]
  assert answer.finish in ('stop', 'length')
  assert [c.passage for c in answer.trace] == asked.passage_C.tolist()
  assert answer.positions == len(asked.prefix) + C + len(asked.given)
  assert answer.rate == answer.context_tokens / C
  assert 0 < answer.seconds_to_first <= answer.seconds
  assert not answer.notes and not any(c.expanded for c in answer.trace)


def test_all_expanded_is_the_plain_decoder(model):
  whole = model.answer('what?', PASSAGES, expand=1.0, max_tokens=5)
  assert all(chunk.expanded for chunk in whole.trace)
  assert whole.rate == 1
  asked = model.read('what?', PASSAGES)
  before = np.concatenate([
    asked.prefix,
    *(ids[:n] for ids, n in zip(asked.chunks_CK, asked.chunk_len_C)),
  ])  # fmt: skip
  plain = model.answer('what?', max_tokens=5)
  assert plain.positions == len(asked.prefix) + len(asked.given)
  assert not plain.trace and plain.rate == 1
  # The same tokens as the question's: no passages, a longer prefix.
  held = model.read
  model.read = lambda *_: held('what?')._replace(prefix=before)
  try:
    assert model.answer('what?', max_tokens=5).tokens == whole.tokens
  finally:
    model.read = held


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_streamed_is_whole_and_together_is_alone(model, temperature):
  asked = [
    ('what?', PASSAGES), ('who?', ['reward ' * i for i in range(1, 3)]),
    ('why so?', []), ('é?', ['日本 token', 'x', 'y']),
  ]  # fmt: skip
  how = dict(
    expand=0.5, selector='rl', max_tokens=9, temperature=temperature, seed=5
  )
  together = model.answer_batch(asked, **how)
  for (question, texts), other in zip(asked, together, strict=True):
    alone = model.answer(question, texts, **how)
    assert (alone.tokens, alone.text) == (other.tokens, other.text)
    stream = model.answer(question, texts, stream=True, **how)
    pieces = list(stream)
    assert ''.join(pieces) == stream.answer.text == alone.text
    assert stream.answer.tokens == alone.tokens
    np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=1e-4)
    assert [c.expanded for c in alone.trace] == [
      c.expanded for c in other.trace
    ]
    assert sum(c.expanded for c in alone.trace) == len(alone.trace) // 2


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(model):
  whole = model.answer(
    'what?', PASSAGES, max_tokens=12, temperature=1.0, seed=1
  )
  assert len(whole.text) > 6
  for stop in (whole.text[3:5], whole.text[0], 'never comes'):
    found = model.answer(
      'what?', PASSAGES, max_tokens=12, temperature=1.0, seed=1, stop=[stop]
    )
    assert found.text == whole.text.split(stop)[0]
    if stop in whole.text:
      assert found.finish == 'stop' and len(found.tokens) <= len(whole.tokens)
  assert model.engine.idle


def test_a_stream_that_nobody_reads_to_its_end_frees_its_slot(model):
  stream = iter(model.answer('what?', PASSAGES, stream=True, max_tokens=30))
  next(stream)
  assert not model.engine.idle
  stream.close()
  for _ in model.engine.run():
    pass
  assert model.engine.idle


def test_streams_that_are_read_in_turns_lose_nothing(model):
  """Whoever moves the engine moves it for all."""
  asked = [('what?', PASSAGES), ('who?', ['a reward']), ('é?', [])]
  how = dict(max_tokens=7, temperature=1.0, seed=2)
  alone = [model.answer(*of, **how) for of in asked]
  streams = [model.answer(*of, stream=True, **how) for of in asked]
  first = next(iter(streams[0]))
  whole = [''.join(stream) for stream in reversed(streams)][::-1]
  whole[0] = first + whole[0]
  assert whole == [of.text for of in alone]
  for stream, of in zip(streams, alone, strict=True):
    assert stream.answer.tokens == of.tokens
    assert stream.answer.seconds_to_first > 0


def test_pools_and_matrices_of_8_bits(config, params, model):
  """Short requests lie in short slots; answers are those of one long pool."""
  make = lambda **options: Refrag(
    config, params, GROUPS, toy_run.mesh(), **options
  )
  asked = [('what?', PASSAGES), ('who?', ['a']), ('é?', [])]
  how = dict(expand=0.5, max_tokens=6)
  other = make(pools=[(1, 128), (2, 48)])
  assert [pool.length for pool in other.engine.pools] == [48, 128]
  expected = model.answer_batch(asked, **how)
  found = other.answer_batch(asked, **how)
  assert [x.tokens for x in found] == [x.tokens for x in expected]
  for pools, said in (([], 'requests at once'), ([(0, 9)], 'or more')):
    with pytest.raises(UserError, match=said):
      make(pools=pools)
  small = make(pools=[(1, 128)], int8=True)
  for layer in small.engine.weights.layers:
    assert layer['q_proj']['kernel'].values.dtype == np.int8
  close = small.answer('what?', PASSAGES, **how)
  assert close.logprobs != expected[0].logprobs
  first = lambda answer: answer.logprobs[0]
  np.testing.assert_allclose(first(close), first(expected[0]), atol=0.05)


@pytest.mark.parametrize('attention', ['dense', 'blockwise'])
def test_prefills_attend_as_the_config_says(config, params, model, attention):
  how = dict(expand=0.5, max_tokens=6, selector='ppl_desc')
  kind = dataclasses.replace(config.model, attention=attention)
  other = Refrag(
    toy_run.replaced(config, model=kind), params, GROUPS, toy_run.mesh(),
    pools=[(1, 128)],
  )  # fmt: skip
  assert other.engine.attend == attention
  expected = model.answer('what?', PASSAGES, **how)
  assert other.answer('what?', PASSAGES, **how).tokens == expected.tokens


class Fake:
  """A tokenizer of code points in UTF-8, a byte an id."""

  @staticmethod
  def decode(ids):
    return bytes(ids).decode('utf-8', errors='replace')


def test_text_comes_in_whole_characters_and_no_stop_string_is_begun():
  writer, pieces = Writer(Fake, ['END', 'NO']), []
  for byte in 'aé日EN😀E'.encode():
    pieces.append(writer.take([byte]))
  assert pieces[:6] == ['a', '', 'é', '', '', '日']
  assert ''.join(pieces) == 'aé日EN😀' and writer.take([]) == ''
  assert writer.take(b'N') == '' and writer.take(b'D') == ''
  assert writer.closed and writer.text == 'aé日EN😀' and not writer.end()
  writer = Writer(Fake, ['END'])
  assert writer.take(b'xE') == 'x' and writer.end() == 'E'
  writer = Writer(Fake)
  assert writer.take('é'.encode()[:1]) == '' and writer.end() == '\ufffd'


# --- Expansion ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (0.25, (0.25, 0, 0)), ('0.25', (0.25, 0, 0)), (1.0, (1.0, 0, 0)),
    (1, (0, 1, 0)), ('3', (0, 3, 0)), ('64t', (0, 0, 64)), (0, (0, 0, 0)),
  ],
)  # fmt: skip
def test_budgets(value, expected):
  assert expansion.budget(value) == expected


@pytest.mark.parametrize(
  'value', [-0.1, 1.5, math.nan, 'x', '', True, -1, '-3t', '2.5t', '1e9', None]
)
def test_budgets_that_are_none(value):
  with pytest.raises(UserError, match='expand is .*: use a share'):
    expansion.budget(value)


def test_a_budget_is_spent_exactly():
  rng = np.random.default_rng(0)
  for _ in range(200):
    C = int(rng.integers(1, 30))
    request = requests.Request(
      *[np.zeros(0)] * 3, rng.integers(1, 9, C), *[np.zeros(0)] * 2,
      np.sort(rng.integers(0, 4, C)), (), (None,) * 4, (),
    )  # fmt: skip
    score = rng.normal(size=C)
    best = lambda n: set(np.argsort(-score)[:n])
    for p in (0.1, 0.29, 0.5, 1.0):
      found = expansion.expanded(score, request, expansion.Budget(p))
      assert set(np.flatnonzero(found)) == best(math.floor(p * C + 1e-9))
    n = int(rng.integers(0, 40))
    found = expansion.expanded(score, request, expansion.Budget(chunks=n))
    assert set(np.flatnonzero(found)) == best(n)
    found = expansion.expanded(score, request, expansion.Budget(tokens=n))
    left = n - request.chunk_len_C[found].sum()
    assert left >= 0 and not (request.chunk_len_C[~found] <= left).any()
    found = expansion.expanded(score, request, expansion.Budget(chunks=n), 2)
    counts = np.bincount(request.passage_C[found], minlength=4)
    room = np.minimum(np.bincount(request.passage_C, minlength=4), 2)
    assert (counts <= 2).all() and counts.sum() == min(n, room.sum())


def test_every_selector_keeps_to_the_budget(model, logits_of):
  chosen = {}
  for selector in expansion.SELECTORS:
    answer = model.answer(
      'what?', ['a passage of some length here'], expand=2, selector=selector,
      max_tokens=2, seed=3,
    )  # fmt: skip
    expanded = [i for i, c in enumerate(answer.trace) if c.expanded]
    scores = [c.score for c in answer.trace]
    assert expanded == sorted(np.argsort(-np.array(scores))[:2])
    chosen[selector] = expanded
  assert chosen['last'] == [len(answer.trace) - 2, len(answer.trace) - 1]
  # The perplexity of each chunk behind those before it, as the evals have it.
  request = model.read('what?', ['a passage of some length here'])
  ids = np.concatenate(
    [x[:n] for x, n in zip(request.chunks_CK, request.chunk_len_C)]
  )
  nll = model.engine.token_nll(ids, model.tokenizer.bos_id)
  logits = logits_of([model.tokenizer.bos_id, *ids[:-1]])
  expected = -jax.nn.log_softmax(logits)[np.arange(len(ids)), ids]
  np.testing.assert_allclose(nll, expected, rtol=1e-4)
  first = np.cumsum(request.chunk_len_C) - request.chunk_len_C
  means = np.add.reduceat(nll, first) / request.chunk_len_C
  assert chosen['ppl_desc'] == sorted(np.argsort(-means)[:2])


# --- What cannot be answered --------------------------------------------------


@pytest.mark.parametrize(
  ('question', 'texts', 'how', 'message'),
  [
    ('', [], {}, 'the question is empty'),
    (' \n', [], {}, 'the question is empty'),
    (None, [], {}, 'the question is empty'),
    ('q', [3], {}, 'passage 1: 3 is no passage'),
    ('q', [{'title': 'x'}], {}, 'passage 1: .* is no passage'),
    ('q', ['a'], {'expand': 2.0}, 'expand is 2.0'),
    ('q', ['a'], {'selector': 'best'}, "selector is 'best': there are rl"),
    ('q', ['a'], {'temperature': math.nan}, 'temperature is nan'),
    ('q', ['a'], {'temperature': -1}, 'temperature is -1'),
    ('q', ['a'], {'top_p': 0}, 'top_p is 0: use a number above 0'),
    ('q', ['a'], {'max_tokens': 0}, 'max_tokens is 0'),
    ('q', ['a'], {'max_tokens': 2.5}, 'max_tokens is 2.5: use a whole'),
    ('q', ['a'], {'seed': -1}, 'seed is -1'),
    ('q', ['a'], {'max_tokens': 500}, 'together .*, and a slot has 128'),
    ('q', ['x' * 70], {}, 'has 18 chunks, and the engine was made for 16'),
    ('q', ['a'] * 9999 + ['x' * 5_000_000], {}, 'characters, more than'),
    ('q', [f'{i}' for i in range(10_000)], {}, 'has 19900 chunks'),
    ('q' * 200, [], {}, 'positions and up to'),
  ],
)
def test_what_is_refused_is_one_sentence(model, question, texts, how, message):
  with pytest.raises(UserError, match=message) as error:
    model.answer(question, texts, **how)
  assert '\n' not in str(error.value)
  assert model.engine.idle


def test_rl_needs_a_policy(model):
  trained, model.trained = model.trained, GROUPS[:3]
  try:
    with pytest.raises(UserError, match='selector rl needs a policy'):
      model.answer('q', ['a'], expand=1, selector='rl')
    last = model.answer('q', ['ab' * 6], expand=1, max_tokens=1)
    assert [c.expanded for c in last.trace] == [False, False, False, True]
  finally:
    model.trained = trained


def test_chunks_need_a_trained_projection(model):
  trained, model.trained = model.trained, ('decoder',)
  try:
    with pytest.raises(UserError, match='no trained projection'):
      model.answer('q', ['some text'], expand=1)
    assert model.answer('q', ['some text'], expand=1.0, max_tokens=1).tokens
    assert model.answer('q', max_tokens=1).tokens
  finally:
    model.trained = trained


def test_what_is_left_out_is_told(model):
  answer = model.answer(
    'q', [' ', 'one', {'text': 'one'}, {'text': 'one', 'title': 'T'}, '\n'],
    max_tokens=1,
  )  # fmt: skip
  assert answer.notes == (
    '2 blank passages left out', '1 repeated passages left out',
  )  # fmt: skip
  assert [p.text for p in answer.passages] == ['one', 'one']


@pytest.mark.parametrize(
  'text', ['a\x00b', '\ud800 x', '<s>[CLS]</s>', '🙂' * 3]
)
def test_any_text_is_a_passage(model, text):
  answer = model.answer(text, [text], max_tokens=2)
  assert answer.trace and answer.finish


def test_passages_of_files(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text('{"id": 1, "title": "T", "text": "one"}\n\n{"text": ""}\n')
  found = passages_lib.read(str(path))
  assert found == [('one', 'T', '1'), ('', '', '')]
  (tmp_path / 'p.txt').write_bytes(b'one\r\nand\r\n\r\n\r\ntwo\n')
  assert passages_lib.read(f'{tmp_path}/p.txt') == [
    ('one\nand', '', ''), ('two', '', ''),
  ]  # fmt: skip
  for content, message in (
    ('{"text": "a"}\n{"text": 3}', 'line 2: .* is no passage'),
    ('{"text": "a"}\nnone', 'line 2: no JSON'),
    ('{"text": "a", "id": 1}\n{"text": "a", "id": "1"}', "id '1' is that of"),
  ):
    path.write_text(content)
    with pytest.raises(UserError, match=message):
      passages_lib.read(str(path))
  with pytest.raises(UserError, match='are not there'):
    passages_lib.read(f'{tmp_path}/none')
