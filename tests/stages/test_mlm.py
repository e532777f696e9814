"""Stage `mlm`: what is hidden, what is predicted, and who starts from it.

Dimension key: B windows, C chunks, M encoder tokens of a chunk or window, X
texts, E encoder width.
"""

import os

import bert_by_hand
import jax
import numpy as np
import pytest
import toy
import toy_config
import toy_run

from refrag_jax import checkpoint, lineage, show
from refrag_jax.data import masked, tokenizers
from refrag_jax.errors import UserError
from refrag_jax.stages import STAGES, mlm

BYTES = tokenizers.load('bytes')
K, MAX_LENGTH = 4, 8  # of toy_config.py
FORMS = (
  ('whole_BM', 'whole_len_B', 'whole_target_BM'),
  ('encoder_BCM', 'encoder_len_BC', 'encoder_target_BCM'),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return toy_config.write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def session(folder):
  cfg = toy_run.config(
    folder,
    stages=('lm', 'mlm', 'reconstruct'),
    stage__reconstruct__init_from='@run/mlm',
  )
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


@pytest.fixture(scope='module')
def trained(session):
  """The session with `lm` and `mlm` trained."""
  toy_run.train(session, 'lm')
  toy_run.train(session, 'mlm')
  return session


def hidden_text(B=400, M=32):
  """Letters alone, of several lengths; what is hidden, and the targets."""
  rng = np.random.default_rng(0)
  length_B = rng.integers(2, M + 1, B)
  ids_BM = rng.integers(97, 123, (B, M))
  m = np.arange(M)
  ids_BM[:, 0] = BYTES.cls_id
  ids_BM[m == length_B[:, None] - 1] = BYTES.sep_id
  ids_BM[m >= length_B[:, None]] = BYTES.pad_id
  new_BM, target_BM = masked.hide(ids_BM, length_B, np.arange(B), (7,), BYTES)
  return ids_BM, new_BM, target_BM


def test_shares_are_those_of_bert():
  ids_BM, new_BM, target_BM = hidden_text()
  text_BM = ids_BM < 256
  predicted_BM = target_BM >= 0
  assert abs(predicted_BM[text_BM].mean() - 0.15) < 0.015
  hidden = (new_BM == BYTES.mask_id)[predicted_BM].mean()
  same = (new_BM == ids_BM)[predicted_BM].mean()
  assert abs(hidden - 0.8) < 0.04
  assert abs(same - 0.1) < 0.03
  # The others are replaced by any id of the vocabulary.
  other = new_BM[predicted_BM & (new_BM != ids_BM) & (new_BM < 259)]
  assert abs(len(other) / predicted_BM.sum() - 0.1) < 0.03
  assert len(np.unique(other)) > 50
  assert other.min() >= 0 and other.max() < BYTES.vocab_size


def test_only_text_is_predicted_and_only_there_anything_changes():
  ids_BM, new_BM, target_BM = hidden_text()
  predicted_BM = target_BM >= 0
  assert not predicted_BM[ids_BM >= 256].any()  # CLS, SEP, padding
  np.testing.assert_array_equal(target_BM[predicted_BM], ids_BM[predicted_BM])
  assert (target_BM[~predicted_BM] == masked.NOT_PREDICTED).all()
  np.testing.assert_array_equal(new_BM[~predicted_BM], ids_BM[~predicted_BM])


def test_a_row_has_its_mask_in_any_batch_and_no_other_row_has_it():
  ids = np.full((6, 3, 20), 97)
  length = np.full((6, 3), 20)
  key_B = np.array([5, 9, 5, 0, 1, 2])
  _, target = masked.hide(ids, length, key_B, (1,), BYTES)
  np.testing.assert_array_equal(target[0], target[2])
  _, alone = masked.hide(ids[:1], length[:1], key_B[1:2], (1,), BYTES)
  np.testing.assert_array_equal(alone[0], target[1])
  _, salted = masked.hide(ids, length, key_B, (2,), BYTES)
  for other in (target[1], target[3], salted[0], target[0][::-1]):
    assert (other != target[0]).any()


def original(batch, b, form):
  """Row b's encoder inputs as they were before anything was hidden."""
  ids, _, target = (batch[key][b] for key in form)
  return np.where(target >= 0, target, ids)


def text_of(ids_M) -> bytes:
  return bytes(i for i in ids_M.tolist() if i < 256)


@pytest.mark.parametrize('factor', [1, 4])
def test_both_forms_hold_the_windows_text(session, factor):
  batch = STAGES['mlm'].task.heldout_batch(
    session.config, 'mlm', session.corpus, 12, num_chunks=factor
  )
  assert batch.keys() == {key for form in FORMS for key in form} | {
    'doc_B', 'id_B',
  }  # fmt: skip
  room = session.config.data.max_encoder_tokens
  assert batch['whole_BM'].shape == (12, min(factor * room, MAX_LENGTH))
  assert batch['encoder_BCM'].shape == (12, factor, room)
  for b in range(12):
    chunks_CM = original(batch, b, FORMS[1])
    text = b''.join(text_of(ids_M) for ids_M in chunks_CM)
    assert len(text) == factor * K
    document = session.corpus.document_text(int(batch['doc_B'][b])).encode()
    assert text in document
    whole_M = original(batch, b, FORMS[0])
    # What the encoder has no position for is cut off; CLS and SEP stay.
    assert text_of(whole_M) == text[: MAX_LENGTH - 2]
    length = batch['whole_len_B'][b]
    assert whole_M[0] == BYTES.cls_id and whole_M[length - 1] == BYTES.sep_id


def test_every_epoch_hides_other_tokens(session):
  long = toy_run.with_stage(session, 'mlm', num_train_steps=300, factors=())
  sample = STAGES['mlm'].sampler(long.config, session.corpus)
  first, again = sample(0, np.arange(8)), 0
  for step in range(1, 300):
    batch = sample(step, np.arange(8))
    for b in np.flatnonzero(np.isin(batch['id_B'], first['id_B'])):
      (old,) = np.flatnonzero(first['id_B'] == batch['id_B'][b])
      for form in FORMS:
        np.testing.assert_array_equal(
          original(batch, b, form), original(first, old, form)
        )
      mask, before = (
        x['encoder_target_BCM'][i] >= 0 for x, i in ((batch, b), (first, old))
      )
      assert (mask != before).any()
      again += 1
  assert again > 8


def test_a_step_is_the_same_for_any_number_of_processes(session):
  sample = STAGES['mlm'].sampler(session.config, session.corpus)
  whole = sample(3, np.arange(8))
  parts = [sample(3, rows) for rows in np.split(np.arange(8), 4)]
  for key, value in whole.items():
    joined = np.concatenate([part[key] for part in parts])
    np.testing.assert_array_equal(joined, value)
  other = STAGES['mlm'].sampler(
    toy_run.replaced(session.config, seed=1), session.corpus
  )
  assert (other(3, np.arange(8))['id_B'] != whole['id_B']).any()


def test_nll_is_that_of_states_times_word_embeddings():
  """Against a BERT by hand in float64, for both forms."""
  rng = np.random.default_rng(0)
  B, C, M = 2, 3, toy.M
  vocab = toy.MODEL.encoder.vocab_size
  batch, rows = {}, [[] for _ in range(B)]
  for (ids, length, target), shape in zip(FORMS, ((B,), (B, C)), strict=True):
    batch[ids] = rng.integers(1, vocab, (*shape, M))
    batch[length] = rng.integers(3, M + 1, shape)
    inside = np.arange(M) < batch[length][..., None] - 1
    batch[target] = np.where(
      inside & (rng.random((*shape, M)) < 0.5),
      rng.integers(0, vocab, (*shape, M)),
      -1,
    )
    for place in np.ndindex(*shape):
      n = batch[length][place]
      encoder = toy.params()['encoder']
      states_ME = bert_by_hand.states(encoder, batch[ids][place][:n])
      logits = states_ME @ np.asarray(encoder['word_embeddings'], float).T
      for m in np.flatnonzero(batch[target][place] >= 0):
        right = logits[m, batch[target][place][m]]
        rows[place[0]].append(np.log(np.exp(logits[m]).sum()) - right)
  got_B = mlm.MLM.evaluate(toy.model(), toy.params(), batch, None, None, None)
  expected_B = [np.mean(row) for row in rows]
  np.testing.assert_allclose(got_B, expected_B, rtol=1e-5)
  total, weight, _ = mlm.MLM.loss(toy.model(), toy.params(), batch, None, None)
  assert weight == sum(len(row) for row in rows)
  np.testing.assert_allclose(total, sum(map(sum, rows)), rtol=1e-5)


@pytest.mark.slow
def test_reconstruct_starts_from_it_where_the_config_says_so(trained):
  directory = trained.checkpoint_dir('mlm')
  assert checkpoint.read_meta(directory)['trained'] == ['decoder', 'encoder']
  started = lineage.initial_params(trained, 'reconstruct')
  after = checkpoint.load_params(
    directory, {'encoder': started['encoder'], 'decoder': started['decoder']}
  )
  before = lineage.initial_params(trained, 'mlm')
  same = lambda a, b: all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
  assert same(started['encoder'], after['encoder'])
  assert not same(started['encoder'], before['encoder'])
  assert same(started['decoder'], before['decoder'])
  by_path = toy_run.with_stage(trained, 'reconstruct', init_from=directory)
  assert same(lineage.initial_params(by_path, 'reconstruct'), started)
  # Without it: from `lm`, with a fresh encoder.
  plain = toy_run.with_stage(trained, 'reconstruct', init_from='')
  fresh = lineage.initial_params(plain, 'reconstruct')
  assert same(fresh['encoder'], before['encoder'])


def test_a_fresh_encoder_may_take_the_decoders_embeddings(trained):
  plain = toy_run.with_stage(trained, 'reconstruct', init_from='')
  taking = toy_run.with_stage(
    plain, 'reconstruct', encoder_init='decoder_embeddings'
  )
  fresh, got = (
    jax.tree.map(np.asarray, lineage.initial_params(s, 'reconstruct'))
    for s in (plain, taking)
  )
  own_VE = got['encoder'].pop('word_embeddings')
  fresh_VE = fresh['encoder'].pop('word_embeddings')
  np.testing.assert_allclose(own_VE.std(), fresh_VE.std(), rtol=0.02)
  embed_VD = got['decoder']['embed_tokens']
  ratio = own_VE / embed_VD
  np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
  for name, leaf in jax.tree_util.tree_leaves_with_path(fresh):
    other = dict(jax.tree_util.tree_leaves_with_path(got))[name]
    np.testing.assert_array_equal(other, leaf, err_msg=str(name))


def test_a_trained_encoder_is_not_overwritten(trained):
  after_mlm = toy_run.with_stage(
    trained, 'reconstruct', encoder_init='decoder_embeddings'
  )
  with pytest.raises(UserError, match='stage reconstruct: encoder_init is for'):
    lineage.initial_params(after_mlm, 'reconstruct')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'stage__reconstruct__encoder_init': 'decoder'}, "no 'decoder'"),
    (
      {
        'stage__reconstruct__encoder_init': 'decoder_embeddings',
        'model__encoder__width': 32,
      },
      r"equal width.*16, 264, 'bytes'.*32, 264, 'bytes'",
    ),
    ({'stages': ('lm', 'mlm', 'reconstruct')}, 'would start from lm all'),
    ({'stages': ('lm', 'mlm'), 'stage__mlm__context_length': 18}, '16 or 20'),
  ],
)
def test_what_cannot_work_is_refused(folder, changes, message):
  with pytest.raises(UserError, match=message):
    toy_run.config(folder, **changes)


def test_data_mode_shows_what_is_hidden(folder, tmp_path, capsys):
  cfg = toy_run.config(folder, stages=('mlm',))
  show.run(cfg, str(tmp_path))
  shown = capsys.readouterr().out
  assert 'whole_BM 8x8' in shown and 'encoder_BCM 8x4x6' in shown
  assert '|MASK]' in shown and 'whole' in shown and 'chunks  |' in shown


def test_the_paths_of_a_run(trained):
  """`@run/mlm` is this run's own directory."""
  assert lineage.init_from(trained, 'reconstruct') == os.path.abspath(
    trained.checkpoint_dir('mlm')
  )
