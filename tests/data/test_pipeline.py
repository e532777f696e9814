"""Batches: right tokens in the right fields, the same for everybody, always."""

import dataclasses
import json
import time
import types

import numpy as np
import pytest

from refrag_jax.config.schema import StageConfig
from refrag_jax.data import pipeline, tokenizers
from refrag_jax.data.tasks import windows as windows_task
from refrag_jax.errors import UserError
from refrag_jax.stages import STAGES

BYTES = tokenizers.load('bytes')
K, S, O = 4, 16, 6
PAPER_STAGES = ('reconstruct', 'cpt', 'mixed', 'grpo')
NAMES = ('lm', *PAPER_STAGES, 'cpt_trained', 'mixed_trained')


def stage(**fields):
  values = {field.name: 0 for field in dataclasses.fields(StageConfig)}
  values |= {
    'num_train_steps': 24,
    'batch_size': 16,
    'context_length': S,
    'output_length': O,
    'factors': (1, 2, 4, 8),
  }
  return StageConfig(**(values | fields))


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """Two sources of different kinds of text, so that rows tell their source."""
  directory = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for name, letters in (('a', 'abcdefghij éñ🦜'), ('b', 'QRSTUVWXYZ')):
    texts = [
      ''.join(rng.choice(list(letters), size=rng.integers(5, 90)))
      for _ in range(80)
    ]
    lines = '\n'.join(json.dumps({'text': t}) for t in texts)
    (directory / f'{name}.jsonl').write_text(lines)
  stages = {name: stage() for name in NAMES}
  stages['lm'] = stage(output_length=32, factors=(), periodic_fraction=0.4)
  return types.SimpleNamespace(
    seed=0,
    model=types.SimpleNamespace(chunk_size=K, piece_length=0),
    data=types.SimpleNamespace(
      text=(str(directory / 'a.jsonl'), str(directory / 'b.jsonl')),
      weights=(3.0, 1.0),
      tokenizer='bytes',
      encoder_tokenizer='bytes',
      max_encoder_tokens=K + 2,
      heldout_fraction=0.25,
      cache_dir=str(directory / 'cache'),
    ),
    stage=stages,
  )


@pytest.fixture(scope='module')
def corpus(config):
  return pipeline.prepare_corpus(config, '')


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert got[name].dtype == want[name].dtype


def batches(config, name, corpus, start=0, process=0, of=1):
  cfg = config.stage[name]
  rows = np.split(np.arange(cfg.batch_size), of)[process]
  sample = STAGES[name].sampler(config, corpus)
  return pipeline.batches(sample, rows, start, cfg.num_train_steps)


def read(*args, **kwargs):
  return list(batches(*args, **kwargs))


@pytest.mark.parametrize('name', NAMES)
def test_formats(config, corpus, name):
  batches = read(config, name, corpus)
  assert [step for step, _ in batches] == list(range(24))
  for step, batch in batches:
    shapes = {key: value.shape for key, value in batch.items()}
    if name == 'lm':
      assert shapes == {
        **dict.fromkeys(
          ['tokens_BT', 'segment_ids_BT', 'positions_BT'], (16, 32)
        ),
        'doc_B': (16,),
      }
    else:
      factor = STAGES[name].chunks_of_steps(config)[step]
      out = factor * K if name == 'reconstruct' else O
      assert shapes == {
        'prefix_BQ': (16, 1),
        'prefix_len_B': (16,),
        'chunks_BCK': (16, factor, K),
        'chunk_len_BC': (16, factor),
        'encoder_BCM': (16, factor, K + 2),
        'encoder_len_BC': (16, factor),
        'encoder_cut_B': (16,),
        'output_BO': (16, out),
        'output_len_B': (16,),
        'loss_mask_BO': (16, out),
        'doc_B': (16,),
        'id_B': (16,),
      }
      assert batch['loss_mask_BO'].dtype == bool
      assert (batch['prefix_BQ'] == BYTES.bos_id).all()
    for key, value in batch.items():
      assert value.dtype == (bool if key == 'loss_mask_BO' else np.int32)
  if name != 'lm':
    # 8 chunks have no room in S tokens; each other factor is one shape.
    assert {b['chunks_BCK'].shape[1] for _, b in batches} == {1, 2, 4}


def test_chunks_beyond_the_encoder_s_cap_are_counted(config, corpus):
  def batch(cap):
    data = types.SimpleNamespace(
      **vars(config.data) | {'max_encoder_tokens': cap}
    )
    changed = types.SimpleNamespace(**vars(config) | {'data': data})
    return read(changed, 'cpt', corpus, start=23)[0][1]

  whole = batch(4 * K + 2)  # a character has at most four bytes
  assert not whole['encoder_cut_B'].any()
  for cap in (K + 1, K + 2):
    cut_BC = whole['encoder_len_BC'] > cap
    np.testing.assert_array_equal(batch(cap)['encoder_cut_B'], cut_BC.sum(1))
    assert cut_BC.any()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('count', [2, 4, 8])
def test_the_same_rows_for_any_number_of_processes(config, corpus, name, count):
  whole = read(config, name, corpus, start=20)
  parts = [read(config, name, corpus, 20, i, count) for i in range(count)]
  for (step, batch), *mine in zip(whole, *parts, strict=True):
    assert [s for s, _ in mine] == [step] * count
    joined = {
      key: np.concatenate([part[key] for _, part in mine]) for key in batch
    }
    assert_same(joined, batch)


@pytest.mark.parametrize('name', NAMES)
def test_resuming_anywhere_gives_the_same_batches(config, corpus, name):
  whole = read(config, name, corpus)
  for start in (1, 7, 23, 24):
    rest = read(config, name, corpus, start)
    assert len(rest) == 24 - start
    for (step, got), (want_step, want) in zip(rest, whole[start:], strict=True):
      assert step == want_step
      assert_same(got, want)


def row_text(corpus, batch, b):
  return corpus.document_text(int(batch['doc_B'][b])).encode()


@pytest.mark.parametrize('name', PAPER_STAGES)
def test_context_and_output_are_neighbours_in_their_document(
  config, corpus, name
):
  train = set(corpus.documents('train').tolist())
  for _, batch in read(config, name, corpus):
    for b in range(16):
      assert int(batch['doc_B'][b]) in train
      context = bytes(batch['chunks_BCK'][b].ravel().tolist())
      output = bytes(batch['output_BO'][b].tolist())
      if name == 'reconstruct':
        assert output == context
        assert context in row_text(corpus, batch, b)
      else:
        assert context + output in row_text(corpus, batch, b)


def test_cpt_takes_the_last_chunks_and_reconstruct_the_first(config, corpus):
  sample = {
    name: STAGES[name].sampler(config, corpus)
    for name in ('cpt', 'reconstruct')
  }
  for name, batch_of in sample.items():
    factors = STAGES[name].chunks_of_steps(config)
    # The same window, wide and narrow: from two schedules of one stream.
    wide = STAGES[name].sampler(
      types.SimpleNamespace(
        **(vars(config) | {'stage': {name: stage(factors=(4,))}})
      ),
      corpus,
    )
    step = int(np.argmin(factors))
    got, want = batch_of(step, np.arange(16)), wide(step, np.arange(16))
    np.testing.assert_array_equal(got['id_B'], want['id_B'])
    chunk = want['chunks_BCK'][:, : 1 if name == 'reconstruct' else None]
    np.testing.assert_array_equal(got['chunks_BCK'], chunk[:, -1:])


def test_control_arms_see_what_their_stage_sees(config, corpus):
  for name in ('cpt', 'mixed'):
    for (_, got), (_, want) in zip(
      read(config, f'{name}_trained', corpus),
      read(config, name, corpus),
      strict=True,
    ):
      assert_same(got, want)
  cpt, mixed = (
    next(b for _, b in batches(config, name, corpus, 23))
    for name in ('cpt', 'mixed')
  )
  assert (cpt['id_B'] != mixed['id_B']).any()
  other = types.SimpleNamespace(**(vars(config) | {'seed': 1}))
  assert (read(other, 'cpt', corpus, 23)[0][1]['id_B'] != cpt['id_B']).any()


@pytest.mark.parametrize('name', ['lm', 'cpt'])
def test_mixture_weights(config, corpus, name):
  docs = np.concatenate([b['doc_B'] for _, b in read(config, name, corpus)])
  share = np.mean(corpus.source[docs] == 0)
  assert abs(share - 0.75) < 0.02


def test_no_target_twice_in_an_epoch(config, corpus):
  sample = STAGES['cpt'].sampler(config, corpus)
  ids, sources = [], []
  for step in range(24):
    batch = sample(step, np.arange(16))
    ids += batch['id_B'].tolist()
    sources += corpus.source[batch['doc_B']].tolist()
  for source in (0, 1):
    mine = [i for i, s in zip(ids, sources, strict=True) if s == source]
    num = len(set(mine))
    assert num > 50
    if len(mine) >= num:  # as long as the windows last, none comes twice
      assert len(set(mine[:num])) == num


def test_lm_rows(config, corpus):
  periodic = 0
  for _, batch in read(config, 'lm', corpus):
    tokens = batch['tokens_BT']
    begins = np.diff(batch['segment_ids_BT'], prepend=0, axis=1) > 0
    assert (tokens[begins] == BYTES.bos_id).all()
    assert ((tokens == BYTES.pad_id) == (batch['segment_ids_BT'] == 0)).all()
    assert (batch['positions_BT'][begins] == 0).all()
    for b in range(16):
      first = tokens[b][batch['segment_ids_BT'][b] == 1][1:]
      periodic += bytes(first.tolist()) not in row_text(corpus, batch, b)
  # 6 of 16 rows repeat a span.
  assert 5.5 * 24 < periodic <= 6 * 24


@pytest.mark.parametrize('name', NAMES)
def test_heldout_batch(config, corpus, name):
  held = set(corpus.documents('heldout').tolist())
  batch = STAGES[name].task.heldout_batch(config, name, corpus, 12)
  assert_same(batch, STAGES[name].task.heldout_batch(config, name, corpus, 12))
  train = next(b for _, b in batches(config, name, corpus, 23))
  assert batch.keys() == train.keys()
  assert {len(v) for v in batch.values()} == {12}
  docs = batch['doc_B'].tolist()
  assert len(set(docs)) == 12
  assert set(docs) <= held
  other = STAGES[name].task.heldout_batch(config, name, corpus, 12, seed=1)
  assert (other['doc_B'] != batch['doc_B']).any()
  # All there is, in place of rows that repeat each other.
  most = STAGES[name].task.heldout_batch(config, name, corpus, 10_000)
  if name != 'lm':
    assert len(set(most['id_B'].tolist())) == len(most['id_B']) < 10_000
    assert batch['chunks_BCK'].shape[1] == 4
    narrow = STAGES[name].task.heldout_batch(
      config, name, corpus, 12, num_chunks=1
    )
    assert narrow['chunks_BCK'].shape[1] == 1
    np.testing.assert_array_equal(narrow['id_B'], batch['id_B'])


def test_eval_windows(config, corpus):
  batch = windows_task.eval_windows(config, corpus, 2 * K, 5, num_windows=30)
  assert batch['chunks_BCK'].shape == (30, 2, K)
  assert batch['output_BO'].shape == (30, 5)
  for b in range(30):
    text = bytes(batch['chunks_BCK'][b].ravel().tolist())
    text += bytes(batch['output_BO'][b].tolist())
    assert text in row_text(corpus, batch, b)
  held = corpus.documents('heldout')
  long = held[np.diff(corpus.token_offsets)[held] >= 2 * K + 5]
  assert len(set(batch['doc_B'].tolist())) == min(30, len(long))


def test_documents_too_short(config, corpus):
  stages = {
    'cpt': stage(context_length=400),
    'lm': stage(output_length=1000),
  }
  wide = types.SimpleNamespace(**(vars(config) | {'stage': stages}))
  with pytest.raises(UserError, match=r'training documents of .*a.jsonl holds'):
    STAGES['cpt'].sampler(wide, corpus)
  with pytest.raises(UserError, match='held-out documents'):
    STAGES['cpt'].task.heldout_batch(wide, 'cpt', corpus, 4)
  # They still serve `lm`, packed.
  batch = STAGES['lm'].sampler(wide, corpus)(0, np.arange(2))
  assert (batch['segment_ids_BT'].max(axis=1) > 5).all()


def test_questions_are_drawn_by_seed_and_step(config, corpus, monkeypatch):
  """Only the wiring: rag.py has its own tests."""
  calls = []

  class Source:
    kinds = ('none', 'given')

    def batch(self, seed, step, rows):
      return {'id_B': np.asarray(rows) + 100 * step, 'seed': np.array([seed])}

    def examples(self, kind, num):
      return {'id_B': np.arange(num), 'kind': kind}

  def build(config, tokenizer, encoder_tokenizer, split, files):
    calls.append((tokenizer.name, encoder_tokenizer.name, split))
    return Source()

  from refrag_jax.data.questions import examples as rag

  monkeypatch.setattr(rag, 'build', build)
  stages = dict.fromkeys(('sft', 'sft_full', 'sft_none'), stage())
  asked = types.SimpleNamespace(**(vars(config) | {'stage': stages}))
  batches = [read(asked, name, corpus, 22, 1, 2) for name in stages]
  for got in batches:
    assert [step for step, _ in got] == [22, 23]
    assert got[1][1]['id_B'].tolist() == [2300 + i for i in range(8, 16)]
    assert got[0][1]['seed'] == batches[0][0][1]['seed']  # twins, same rows
  assert (
    STAGES['sft'].task.heldout_batch(asked, 'sft', corpus, 3)['kind'] == 'given'
  )
  assert calls == [('bytes', 'bytes', 'train')] * 3 + [
    ('bytes', 'bytes', 'heldout')
  ]


def test_speed(config, corpus):
  """128 windows of 8 chunks of 8 in a few milliseconds; the bound is loose."""
  wide = types.SimpleNamespace(
    **vars(config)
    | {
      'model': types.SimpleNamespace(chunk_size=8, piece_length=0),
      'stage': {
        'cpt': stage(
          context_length=64, output_length=16, batch_size=128, factors=()
        )
      },
    }
  )
  sample = STAGES['cpt'].sampler(wide, corpus)
  times = []
  for step in range(20):
    begin = time.perf_counter()
    sample(step, np.arange(128))
    times.append(time.perf_counter() - begin)
  assert min(times) < 0.01
