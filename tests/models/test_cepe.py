"""The baseline CEPE: what its decoder reads of the context, and how it starts.

Dimension key: B batch, P pieces, M encoder tokens of a piece, S states to read,
O output slots, T decoder positions, E encoder width, D decoder width, N query
heads, J key/value heads, H head dimension.
"""

import dataclasses
import functools

import forward
import jax
import numpy as np
import pytest
import toy
import toy_config
import toy_run

from refrag_jax import lineage, session
from refrag_jax.config import schema as config_lib
from refrag_jax.errors import UserError
from refrag_jax.models import cepe
from refrag_jax.models.refrag import init_params
from refrag_jax.runtime import files
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES

PARAMS = toy.params(toy.CEPE)
LENGTH = 4  # of a piece in the sessions below: four to a context


@functools.cache
def jitted(cfg=toy.CEPE):
  return toy.jit(functools.partial(forward.cepe_nll, toy.model(cfg)))


def nll(batch, params=PARAMS):
  return np.asarray(jitted()(params, batch))


def plain(batch):
  """The decoder alone, without context."""
  run = toy.jit(
    lambda batch: forward.plain_nll(toy.model(), PARAMS, batch, 'none')
  )
  return np.asarray(run(batch))


def with_pieces(batch, **fields):
  return batch | {f'piece_{key}': value for key, value in fields.items()}


@pytest.mark.parametrize('P', [3, 1, 0])
def test_a_context_of_no_pieces_is_the_plain_decoder(P):
  batch = toy.batch(B=3)
  assert (nll(batch)[:2] != plain(batch)[:2]).all()
  empty = with_pieces(
    batch, BPM=batch['piece_BPM'][:, :P], len_BP=np.zeros((3, P), np.int32)
  )
  np.testing.assert_array_equal(nll(empty), plain(batch))
  # The toy batch's last row has none, beside rows that have some.
  np.testing.assert_array_equal(nll(batch)[2], plain(batch)[2])


def test_cross_attention_is_the_one_written_by_hand():
  """Float64, one query and one head at a time, over readable states alone."""
  d, E = toy.MODEL.decoder, toy.MODEL.encoder.width
  rng = np.random.default_rng(0)
  x_BTD = rng.standard_normal((2, 3, d.width)).astype(np.float32)
  states_BSE = rng.standard_normal((2, 5, E)).astype(np.float32)
  readable_BS = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
  params = jax.tree.map(lambda x: x[1], PARAMS['cross'])  # of the second layer
  found_BTD = cepe.CrossAttention(d).apply(
    {'params': params}, x_BTD, (states_BSE, readable_BS)
  )
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for b, t in np.ndindex(2, 3):
    x_D = x_BTD[b, t].astype(np.float64)
    h_D = x_D / np.sqrt((x_D**2).mean() + d.norm_eps) * p['layernorm']['scale']
    read_SE = states_BSE[b, readable_BS[b]]
    for n in range(d.num_heads):
      j = n * d.num_kv_heads // d.num_heads
      q_H = h_D @ p['q_proj']['kernel'][:, n]
      weight_S = np.exp(
        read_SE @ p['k_proj']['kernel'][:, j] @ q_H / d.head_dim**0.5
      )
      value_SH = read_SE @ p['v_proj']['kernel'][:, j]
      out_H = weight_S @ value_SH / weight_S.sum()
      x_D = x_D + out_H @ p['o_proj']['kernel'][n]
    np.testing.assert_allclose(found_BTD[b, t], x_D, rtol=1e-4, atol=1e-5)


def test_the_decoder_reads_its_own_pieces_in_any_order():
  batch = toy.batch(B=3)
  batch['piece_len_BP'][:] = [[6, 4, 0], [3, 5, 6], [0, 6, 3]]
  own_BO = nll(batch)
  roll = lambda axis: with_pieces(
    batch,
    BPM=np.roll(batch['piece_BPM'], 1, axis),
    len_BP=np.roll(batch['piece_len_BP'], 1, axis),
  )
  assert (np.abs(nll(roll(0)) - own_BO) > 1e-4).all()  # another row's
  # Cross-attention has no positions.
  np.testing.assert_allclose(nll(roll(1)), own_BO, rtol=1e-5)


def test_padding_and_chunks_are_not_read():
  batch = toy.batch(B=3)
  own_BO = nll(batch)
  M = batch['piece_BPM'].shape[2]
  is_padding_BPM = np.arange(M) >= batch['piece_len_BP'][..., None]
  assert is_padding_BPM[batch['piece_len_BP'] > 0].any()
  filled = np.where(is_padding_BPM, 7, batch['piece_BPM'])
  np.testing.assert_array_equal(nll(with_pieces(batch, BPM=filled)), own_BO)
  more = with_pieces(
    batch,
    BPM=np.pad(batch['piece_BPM'], ((0, 0), (1, 2), (0, 0))),
    len_BP=np.pad(batch['piece_len_BP'], ((0, 0), (1, 2))),
  )
  np.testing.assert_allclose(nll(more), own_BO, rtol=1e-5)
  batch['piece_len_BP'] = np.minimum(batch['piece_len_BP'], M - 1)
  narrow = with_pieces(batch, BPM=batch['piece_BPM'][:, :, : M - 1])
  np.testing.assert_allclose(nll(narrow), nll(batch), rtol=1e-5)
  for key in ('chunks_BCK', 'encoder_BCM'):
    np.testing.assert_array_equal(
      nll(batch | {key: batch[key] + 1}), nll(batch)
    )


def test_every_parameter_of_its_groups_matters_and_no_other():
  batch = toy.batch(B=3)
  grads = toy.jit(
    jax.grad(lambda params: jitted()(params, batch).sum()),
  )(PARAMS)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = path_str(path)
    if 'k_proj/bias' in name:
      continue  # a softmax does not see what is added to all of its logits
    read = name.split('/')[0] in ('encoder', 'cross', 'decoder')
    assert (np.abs(np.asarray(grad)).max() > 1e-5) == read, name


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
  batch = toy.batch(B=3)

  def value_and_grad(cfg):
    total = lambda params: jitted(cfg)(params, batch).sum()
    return toy.jit(jax.value_and_grad(total))(PARAMS)

  expected = value_and_grad(toy.CEPE)
  found = value_and_grad(dataclasses.replace(toy.CEPE, remat='dots'))
  assert toy.distance(expected, found) < 1e-5


def planted(seed, B=64):
  """The output's two tokens stand in the row's one piece, and nowhere else."""
  ids_B2 = np.random.default_rng(seed).integers(3, 24, (B, 2)).astype(np.int32)
  special = lambda token: np.full((B, 1), token, np.int32)
  return toy.batch(B, C=1, Q=1, O=2) | {
    'piece_BPM': np.concatenate([special(1), ids_B2, special(2)], 1)[:, None],
    'piece_len_BP': special(4),
    'output_BO': ids_B2,
    'output_len_B': np.full(B, 2, np.int32),
    'loss_mask_BO': np.ones((B, 2), bool),
  }


@pytest.mark.slow
def test_training_learns_to_read_the_pieces():
  """With a random decoder, frozen: encoder and cross-attention do it."""
  state, batch = toy.state('cepe'), planted(seed=1000)
  other = batch | {'piece_BPM': np.roll(batch['piece_BPM'], 1, 0)}
  before = nll(batch).mean()
  for seed in range(200):
    state, _ = toy.step('cepe')(state, planted(seed))
  own, shuffled = (nll(b, state.params).mean() for b in (batch, other))
  print(f'before {before:.2f} own {own:.2f} shuffled {shuffled:.2f}')
  assert own < np.log(21) - 0.5 < before  # 21 tokens to guess from
  assert own < shuffled - 1.5


@pytest.mark.slow
def test_the_group_is_there_only_when_asked_for():
  """And the other four are then, bitwise, what they are without it."""
  init = lambda cfg: toy.jit(init_params, static_argnums=0)(
    cfg, jax.random.key(3)
  )
  four, five = init(toy.MODEL), init(toy.CEPE)
  assert five.keys() - four.keys() == {'cross'}
  for group, expected in four.items():
    jax.tree.map(np.testing.assert_array_equal, five[group], expected)
  # Each layer is drawn for itself.
  q_YDNH = five['cross']['q_proj']['kernel']
  assert len(q_YDNH) == toy.MODEL.decoder.num_layers
  assert (q_YDNH[0] != q_YDNH[1]).all()


@pytest.mark.parametrize('width', [8, 16, 20])
def test_it_starts_from_the_decoders_own_attention(width):
  """Where shapes permit: the decoder is 16 wide."""
  encoder = dataclasses.replace(toy.CEPE.encoder, width=width)
  cfg = dataclasses.replace(toy.CEPE, encoder=encoder)
  fresh = toy.params(cfg)
  started = toy.jit(cepe.copy_self_attention)(fresh)
  own, cross = fresh['decoder']['layers'], started['cross']
  equal = np.testing.assert_array_equal
  for name in ('q_proj', 'o_proj'):
    equal(cross[name]['kernel'], own[name]['kernel'])
  equal(cross['layernorm']['scale'], own['post_attention_layernorm']['scale'])
  for name in ('k_proj', 'v_proj'):
    source = own if width <= 16 else fresh['cross']
    equal(cross[name]['kernel'], source[name]['kernel'][:, :width])
  for group in fresh.keys() - {'cross'}:
    jax.tree.map(equal, started[group], fresh[group])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return toy_config.write_data(tmp_path_factory.mktemp('data'))


def opened(folder, **changes):
  cfg = toy_run.config(folder, **changes)
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


@pytest.mark.parametrize(
  ('name', 'base'),
  [('cepe_warmup', 'reconstruct'), ('cepe', 'cpt'), ('cepe_unfrozen', 'cpt')],
)
@pytest.mark.parametrize('length', [4, 2])
def test_pieces_hold_the_context_of_the_windows_of_refrag(
  folder, name, base, length
):
  s = opened(folder, model__piece_length=length)
  s = toy_run.with_stage(s, base, factors=())
  rows = np.arange(8)
  batch = STAGES[name].sampler(s.config, s.corpus)(2, rows)
  of_refrag = STAGES[base].sampler(s.config, s.corpus)(2, rows)
  assert batch.keys() - of_refrag.keys() == {'piece_BPM', 'piece_len_BP'}
  for key, values in of_refrag.items():
    np.testing.assert_array_equal(batch[key], values)
  assert batch['piece_BPM'].shape == (
    8,
    16 // length,
    config_lib.piece_tokens(s.config),
  )
  for b in rows:
    read = [
      token
      for ids_M, size in zip(batch['piece_BPM'][b], batch['piece_len_BP'][b])
      for token in ids_M[1 : size - 1]  # between CLS and SEP
    ]
    assert read == batch['chunks_BCK'][b].ravel().tolist()


def test_room_for_a_piece_is_as_for_chunks_within_the_encoders_positions():
  cfg = toy_run.config('', model__piece_length=4)
  assert config_lib.piece_tokens(cfg) == 6  # a chunk of 4 has 4 and two more
  for piece, most, room in ((8, 99, 10), (10, 99, 14), (16, 17, 17), (2, 8, 6)):
    model = dataclasses.replace(
      cfg.model,
      piece_length=piece,
      encoder=dataclasses.replace(cfg.model.encoder, max_length=most),
    )
    changed = toy_run.replaced(cfg, model=model)
    assert config_lib.piece_tokens(changed) == room


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    ({'stages': ('lm', 'cepe')}, ('piece_length is 0', 'cepe')),
    ({'model__piece_length': -1}, ('piece_length', '0 or greater')),
    ({'model__piece_length': 7}, ('max_length 8', 'use 6 or less')),
    (
      {'model__piece_length': 6, 'stages': ('lm', 'cepe')},
      ('cepe.context_length 16', 'use 12 or 18'),
    ),
    (
      {'model__piece_length': 6, 'evals': ('log_perplexity',)},
      ('cpt.context_length 16', 'use 12 or 18'),
    ),
    (
      {
        'model__piece_length': 4,
        'stages': ('lm', 'cepe'),
        'stage__cepe__factors': (2, 4),
      },
      ('cepe.factors', 'no curriculum'),
    ),
  ],
)
def test_impossible_pieces_are_refused(changes, parts):
  with pytest.raises(UserError) as e:
    toy_run.config('', **changes)
  assert str(e.value).startswith('config.') and '\n' not in str(e.value)
  for part in parts:
    assert part in str(e.value)


@pytest.fixture(scope='module')
def compile_cache(tmp_path_factory):
  with toy_run.compile_cache(tmp_path_factory.mktemp('compiled')):
    yield


@pytest.mark.slow
def test_an_arm_starts_from_a_decoder_that_was_trained_without_it(
  folder, compile_cache
):
  """lm without the fifth group, then cepe_warmup; cepe goes on from there."""
  toy_run.train(opened(folder), 'lm')
  s = opened(folder, model__piece_length=LENGTH)
  lm, _ = session.load_params(s, s.checkpoint_dir('lm'), 'test')
  start = lineage.initial_params(s, 'cepe_warmup')
  jax.tree.map(np.testing.assert_array_equal, start['decoder'], lm['decoder'])
  own = lm['decoder']['layers']['q_proj']['kernel']
  np.testing.assert_array_equal(start['cross']['q_proj']['kernel'], own)
  toy_run.train(s, 'cepe_warmup')
  assert files.read_json(s.record_path('cepe_warmup'))['frozen_unchanged']
  warm = s.checkpoint_dir('cepe_warmup')
  params, groups = session.load_params(s, warm, 'test')
  assert set(groups) == {'encoder', 'decoder', 'cross'}
  jax.tree.map(np.testing.assert_array_equal, params['decoder'], lm['decoder'])
  began = lineage.initial_params(s, 'cepe')
  for group in ('encoder', 'cross'):
    jax.tree.map(np.testing.assert_array_equal, began[group], params[group])
    assert toy.distance(start[group], params[group]) > 1e-4
  other = opened(folder, model__piece_length=2)
  with pytest.raises(UserError, match='piece_length is 4 there and 2 here'):
    session.load_params(other, warm, 'test')
