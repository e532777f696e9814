"""Runs that train adapters: what their checkpoints hold, and need."""

import os
import shutil

import jax
import numpy as np
import pytest
import toy_config
import toy_run
from safetensors.numpy import load_file
from toy_run import one_device  # noqa: F401

from refrag_jax import checkpoint, exchange, lineage, session
from refrag_jax import run as training
from refrag_jax.errors import Stopped, UserError
from refrag_jax.hf import convert, families, sources
from refrag_jax.models import lora
from refrag_jax.models.refrag import init_params


def write_models(folder, model, seed: int) -> str:
  """Directories of a decoder and an encoder, as `init_from` names them."""
  params = init_params(model, jax.random.key(seed))
  for group, to_json in (
    ('decoder', families.decoder_json), ('encoder', families.encoder_json)
  ):  # fmt: skip
    shutil.rmtree(folder / group, ignore_errors=True)
    os.makedirs(folder / group)
    values = to_json(getattr(model, group))
    convert.write_params(
      str(folder / group), group, params[group], values, np.float32
    )
  return f'{folder}/decoder,{folder}/encoder'


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
  """Of a run that starts from directories and trains adapters of rank 2."""
  data = toy_config.write_data(tmp_path_factory.mktemp('data'))
  config = toy_run.config(
    data, stages=('reconstruct', 'cpt', 'cpt_trained'), evals=(),
    model__lora__rank=2, model__decoder__max_length=64,
    stage__reconstruct__num_train_steps=2, stage__cpt__num_train_steps=3,
  )  # fmt: skip
  where = tmp_path_factory.mktemp('models')
  return toy_run.replaced(
    config, init_from=write_models(where, config.model, 7)
  )


@pytest.fixture(scope='module')
def run(cfg, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('run'))
  training.run(with_arm(cfg), workdir)
  return workdir


def with_arm(config):
  """The control arm starts from the same models."""
  arm = config.stage['cpt_trained']
  arm = toy_run.replaced(arm, init_from=config.init_from)
  return toy_run.replaced(config, stage=config.stage | {'cpt_trained': arm})


def loaded(config, directory):
  opened = session.open_model(config)
  return session.load_params(opened, directory, 'this test')


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_checkpoint_holds_what_is_trained_and_names_the_rest(cfg, run):
  base, _ = loaded(cfg, cfg.init_from)
  for stage, trained in (
    ('reconstruct', {'decoder', 'encoder', 'projection'}),
    ('cpt', {'decoder', 'encoder', 'projection', 'lora'}),
    ('cpt_trained', {'decoder', 'encoder', 'lora'}),
  ):
    directory = f'{run}/checkpoints/{stage}'
    meta = checkpoint.read_meta(directory)
    assert set(meta['trained']) == trained
    assert meta['base_decoder']['source'] == cfg.init_from
    held = {path.split('/')[0] for path in meta['digests']['params']}
    assert held == {'encoder', 'projection', 'policy', 'lora'}
    params, _ = loaded(cfg, directory)
    equal(params['decoder'], base['decoder'])
    moved = np.abs(np.asarray(params['lora']['q_proj']['b']['kernel'])).max()
    assert (moved > 0) == ('lora' in trained)


def test_it_goes_on_where_it_stopped(cfg, run, tmp_path):
  workdir = str(tmp_path / 'run')
  shutil.copytree(run, workdir)
  for part in ('checkpoints/cpt', 'stages/cpt.json'):
    path = os.path.join(workdir, part)
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
  opened = toy_run.open_session(with_arm(cfg), workdir, toy_run.mesh())
  with pytest.raises(Stopped):
    toy_run.train(opened, 'cpt', stop_in=2)
  toy_run.train(opened, 'cpt')
  equal(
    loaded(cfg, f'{workdir}/checkpoints/cpt')[0],
    loaded(cfg, f'{run}/checkpoints/cpt')[0],
  )


def test_an_export_is_an_ordinary_model(cfg, run, tmp_path):
  source, target = f'{run}/checkpoints/cpt', str(tmp_path / 'out')
  assert exchange.run_export(cfg, run, source, target) == 0
  params, _ = loaded(cfg, source)
  plain = toy_run.replaced(
    cfg, model=toy_run.replaced(
      cfg.model, lora=toy_run.replaced(cfg.model.lora, rank=0)
    )
  )  # fmt: skip
  again, groups = loaded(plain, target)
  assert sources.is_source(target) and 'lora' not in groups
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert '`adapter/`' in card
  assert len(load_file(f'{target}/adapter/adapter_model.safetensors')) == (
    2 * len(cfg.model.lora.targets) * cfg.model.decoder.num_layers
  )
  equal(again['decoder'], lora.merge(params, cfg.model.lora)['decoder'])


def test_changes_alone_are_read_over_the_models_again(cfg, run, tmp_path):
  """In bfloat16: what was trained, and not the decoder."""
  source, target = f'{run}/checkpoints/cpt', str(tmp_path / 'out')
  assert exchange.run_export(cfg, run, source, target, changes=True) == 0
  assert sorted(os.listdir(target)) == [
    'README.md', 'changes.safetensors', 'refrag.json',
  ]  # fmt: skip
  params, groups = loaded(cfg, source)
  again, read = loaded(cfg, target)
  assert set(read) == set(groups)
  base, _ = loaded(cfg, cfg.init_from)
  equal(again['decoder'], base['decoder'])
  saved = load_file(f'{target}/changes.safetensors')
  assert {str(x.dtype) for x in saved.values()} == {'bfloat16'}
  assert not any(name.startswith('decoder/') for name in saved)
  for group in ('lora', 'encoder', 'projection'):
    ours = jax.tree.map(lambda x: x.astype('bfloat16'), params[group])
    equal(jax.tree.map(lambda x: x.astype('bfloat16'), again[group]), ours)
    assert any(name.startswith(f'{group}/') for name in saved)
  # Another stage starts from it; and from that its adapters' decoder is found.
  opened = session.open_model(cfg)
  known = session.base_decoder(opened, target, again)
  equal(session.read_base_decoder(opened, known, 'x'), base['decoder'])


def test_changes_that_the_disk_has_no_room_for_are_told_before(
  cfg, run, tmp_path, monkeypatch
):
  """Room for what changed is enough: the decoder is not written."""
  source, out = f'{run}/checkpoints/cpt', str(tmp_path / 'out')
  usage = shutil.disk_usage(tmp_path)
  params, _ = loaded(cfg, source)
  least = 2 * sum(
    x.size
    for group in ('lora', 'encoder', 'projection')
    for x in jax.tree.leaves(params[group])
  )
  for free, fits in ((least - 1, False), (least, True)):
    left = usage._replace(free=free)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _, left=left: left)
    if fits:
      assert exchange.run_export(cfg, run, source, out, changes=True) == 0
    else:
      with pytest.raises(UserError, match='the export needs'):
        exchange.run_export(cfg, run, source, out, changes=True)
      assert os.listdir(tmp_path) == []


def test_changes_of_other_models_are_refused(cfg, run, tmp_path):
  where = tmp_path / 'models'
  config = toy_run.replaced(cfg, init_from=write_models(where, cfg.model, 7))
  config = toy_run.replaced(config, stages=('reconstruct',))
  workdir, target = str(tmp_path / 'run'), str(tmp_path / 'out')
  training.run(config, workdir)
  source = f'{workdir}/checkpoints/reconstruct'
  exchange.run_export(config, workdir, source, target, changes=True)
  held = load_file(f'{target}/changes.safetensors')
  assert not any(name.startswith('decoder/') for name in held)
  loaded(config, target)
  write_models(where, cfg.model, 8)
  with pytest.raises(UserError, match='what lies there now is another one'):
    loaded(config, target)
  shutil.rmtree(where)
  with pytest.raises(UserError, match='models/decoder'):
    loaded(config, target)
  ranks = toy_run.replaced(cfg.model.lora, rank=4)
  other = toy_run.replaced(cfg, model=toy_run.replaced(cfg.model, lora=ranks))
  changed = str(tmp_path / 'cpt')
  exchange.run_export(cfg, run, f'{run}/checkpoints/cpt', changed, changes=True)
  with pytest.raises(UserError, match='lora'):
    loaded(other, changed)


def test_there_are_no_changes_of_nothing(cfg, tmp_path):
  own = toy_run.replaced(
    cfg, init_from='', stages=('lm',),
    model=toy_run.replaced(
      cfg.model, lora=toy_run.replaced(cfg.model.lora, rank=0)
    ),
  )  # fmt: skip
  training.run(own, str(tmp_path / 'run'))
  source = str(tmp_path / 'run/checkpoints/lm')
  with pytest.raises(UserError, match='not trained from models of others'):
    exchange.run_export(own, '', source, str(tmp_path / 'out'), changes=True)
  assert not (tmp_path / 'out').exists()


def test_another_decoder_is_refused(cfg, run, tmp_path):
  """The one that adapters were trained for was written over, or is gone."""
  where = tmp_path / 'models'
  config = toy_run.replaced(cfg, init_from=write_models(where, cfg.model, 7))
  config = toy_run.replaced(config, stages=('reconstruct',))
  workdir = str(tmp_path / 'run')
  training.run(config, workdir)
  directory = f'{workdir}/checkpoints/reconstruct'
  loaded(config, directory)
  write_models(where, cfg.model, 8)
  with pytest.raises(UserError, match='now holds another decoder than the one'):
    loaded(config, directory)
  shutil.rmtree(where)
  with pytest.raises(UserError, match='models/decoder'):
    loaded(config, directory)


def test_of_a_rank_of_its_own(cfg, run):
  other = toy_run.replaced(cfg.model.lora, rank=4)
  config = toy_run.replaced(cfg, model=toy_run.replaced(cfg.model, lora=other))
  loaded(config, f'{run}/checkpoints/reconstruct')  # none of them is trained
  with pytest.raises(UserError, match='lora.rank is 2 there and 4 here'):
    loaded(config, f'{run}/checkpoints/cpt')


def test_a_config_without_any_refuses_them_and_goes_on_without(cfg, run):
  none = toy_run.replaced(cfg.model.lora, rank=0)
  config = toy_run.replaced(cfg, model=toy_run.replaced(cfg.model, lora=none))
  with pytest.raises(UserError, match='lora.rank is 2 there and 0 here'):
    loaded(config, f'{run}/checkpoints/cpt')
  opened = toy_run.open_session(with_arm(config), run, toy_run.mesh())
  with pytest.raises(UserError, match='lora.rank is 2 there and 0 here'):
    lineage.start_state(opened, 'cpt', {}, None)
  params, groups = loaded(config, f'{run}/checkpoints/reconstruct')
  assert 'lora' not in {*params, *groups}
