"""Ablation arms: configs by data, checkpoints of other arms, failures."""

import dataclasses
import os
import shutil
import sys
import tomllib

import jax
import numpy as np
import pytest
import toy_config
import toy_run
from toy_run import one_device  # noqa: F401

from refrag_jax import checkpoint, cli, lineage, resolve, results
from refrag_jax import run as training
from refrag_jax.config.schema import ArmConfig
from refrag_jax.errors import Stopped, UserError
from refrag_jax.repro import run as repro
from refrag_jax.runtime import files, workdir
from refrag_jax.runtime.environment import ROOT
from refrag_jax.session import abstract_params, fresh_params


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return toy_config.write_data(tmp_path_factory.mktemp('data'))


def arm(stages=(), evals=(), changes=()):
  return ArmConfig(stages, evals, changes)


EMPTY_CLAIMS = ''


def with_arms(cfg, chosen=(), seeds=(0,), **arms):
  section = dataclasses.replace(cfg.repro, arms=chosen, seeds=seeds, arm=arms)
  return dataclasses.replace(cfg, repro=section)


def test_changes_are_what_one_would_type(folder):
  cfg = toy_run.config(folder)
  changed = resolve.changed(
    cfg,
    (
      'model.decoder.width=32',
      'stage.cpt.factors=(1,2)',
      'stage.cpt.init_from=@main/lm',
      'model.policy.positions=false',
      'stage.lm.peak_learning_rate=1e-4',
    ),
  )
  assert changed.model.decoder.width == 32
  assert changed.stage['cpt'].factors == (1, 2)
  assert changed.stage['cpt'].init_from == '@main/lm'
  assert changed.model.policy.positions is False
  assert changed.stage['lm'].peak_learning_rate == 1e-4
  # Nothing else, and not the config it came from.
  assert cfg == toy_run.config(folder)
  back = ('model.decoder.width=16', 'stage.cpt.factors=(2,4)',
          'stage.cpt.init_from=', 'model.policy.positions=true',
          'stage.lm.peak_learning_rate=3e-3')  # fmt: skip
  assert resolve.changed(changed, back) == cfg


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('model.chunksize=8', "did you mean 'model.chunk_size'"),
    ('stage.ctp.factors=(1,)', "did you mean 'stage.cpt.factors'"),
    ('stage.cpt=3', 'there is no config key'),
    ('model.chunk_size', 'there is no config key'),
    ('model.chunk_size=many', 'a whole number'),
    ('model.chunk_size=5', 'is not a multiple of'),
  ],
)
def test_an_impossible_change_names_its_arm(folder, change, message):
  cfg = with_arms(
    toy_run.config(folder), strange=arm(('lm', 'reconstruct'), (), (change,))
  )
  with pytest.raises(UserError, match='arm strange: ') as e:
    repro.arm_config(cfg, 'strange', 0, 'w')
  assert message in str(e.value) and '\n' not in str(e.value)


def test_an_arm_is_the_config_with_its_values(folder):
  cfg = with_arms(
    toy_run.config(folder, evals=('reconstruction',)),
    a=arm(('lm',)),
    b=arm(('cpt',), ('copying',), ('stage.cpt.init_from=@a/lm',)),
  )
  a = repro.arm_config(cfg, 'a', 3, 'w')
  assert (a.name, a.seed, a.stages) == ('toy_run_a', 3, ('lm',))
  assert a.evals == ('reconstruction',) and not a.repro.arm
  b = repro.arm_config(cfg, 'b', 3, 'w')
  assert b.evals == ('copying',)
  assert a.data.cache_dir == b.data.cache_dir != ''


@pytest.mark.parametrize('preset', ['cpu', 'gpu', 'smoke'])
def test_every_arm_of_the_project_builds(preset):
  cfg = cli.load(
    cli.parse([f'--config={ROOT}/configs/repro.py:{preset}'])
  ).config
  order = repro.in_order(cfg)
  assert order[0] == 'main' and len(order) == 17
  for name in order:
    built = repro.arm_config(cfg, name, 0, 'w')
    assert built.stages and built.evals


def test_arms_come_after_those_they_start_from(folder):
  from_b = arm((), (), ('stage.cpt.init_from=@b/lm',))
  from_c = arm((), (), ('stage.lm.num_train_steps=1', 'init_from=@c/lm'))
  arms = {'a': from_b, 'b': from_c, 'c': arm(), 'd': from_b}
  cfg = with_arms(toy_run.config(folder), **arms)
  order = repro.in_order(cfg)
  assert sorted(order) == ['a', 'b', 'c', 'd']
  assert order.index('c') < order.index('b') < order.index('a')
  assert repro.in_order(with_arms(cfg, ('a', 'c'), **arms)) == ['c', 'a']
  ring = with_arms(cfg, b=from_c, c=from_b)
  with pytest.raises(UserError, match='start from each other'):
    repro.in_order(ring)


def test_a_stage_of_a_run_beside(folder, tmp_path):
  """@RUN/STAGE is found wherever the two workdirs lie."""
  cfg = toy_run.config(folder, stage__cpt__init_from='@main/lm')
  session = toy_run.open_session(cfg, tmp_path / 'k8', toy_run.mesh())
  beside = str(tmp_path / 'main' / 'checkpoints' / 'lm')
  assert lineage.init_from(session, 'cpt') == beside
  with pytest.raises(UserError, match=f'there is no checkpoint in {beside}'):
    lineage.initial_params(session, 'cpt')


@pytest.fixture(scope='module')
def runs(folder, tmp_path_factory):
  """Workdirs of an `lm` and of a `mixed` that starts from it, one step each."""
  root = tmp_path_factory.mktemp('runs')
  one = dict(stage__lm__num_train_steps=1, stage__mixed__num_train_steps=1)
  cfg = toy_run.config(folder, **one)
  session = toy_run.open_session(cfg, root / 'main', toy_run.mesh())
  toy_run.train(session, 'lm')
  after = toy_run.config(folder, **one, stage__mixed__init_from='@main/lm')
  session = toy_run.open_session(after, root / 'mixed', toy_run.mesh())
  toy_run.train(session, 'mixed')
  return root


def start(folder, root, stage, **changes):
  cfg = toy_run.config(folder, stages=(stage,), **changes)
  session = toy_run.open_session(cfg, root / 'other', toy_run.mesh())
  return session, lineage.initial_params(session, stage)


def stored(root, run, stage):
  directory = str(root / run / 'checkpoints' / stage)
  return checkpoint.read_meta(directory), directory


def test_an_lm_serves_every_encoder_and_chunk_size(folder, runs):
  meta, directory = stored(runs, 'main', 'lm')
  assert meta['trained'] == ['decoder']
  session, params = start(
    folder, runs, 'reconstruct', stage__reconstruct__init_from='@main/lm',
    model__encoder__width=32, model__chunk_size=8,
    data__max_encoder_tokens=8,
  )  # fmt: skip
  abstract = {'decoder': abstract_params(session)['decoder']}
  read = checkpoint.load_params(directory, abstract)
  jax.tree.map(
    np.testing.assert_array_equal, params['decoder'], read['decoder']
  )
  assert params['encoder']['word_embeddings'].shape[1] == 32
  fresh = fresh_params(session, ['encoder'])['encoder']
  jax.tree.map(np.testing.assert_array_equal, params['encoder'], fresh)


def test_what_a_checkpoint_has_trained_must_fit(folder, runs):
  meta, _ = stored(runs, 'mixed', 'mixed')
  assert meta['trained'] == ['decoder', 'encoder', 'projection']
  # The policy is not among it.
  _, params = start(
    folder, runs, 'grpo', stage__grpo__init_from='@mixed/mixed',
    model__policy__positions=False, model__policy__num_layers=2,
  )  # fmt: skip
  assert {'layers_0', 'layers_1'} <= params['policy'].keys()
  for changes, name in (
    ({'model__encoder__mlp_width': 64}, 'model.encoder.mlp_width'),
    ({'model__chunk_size': 8, 'data__max_encoder_tokens': 8},
     'model.chunk_size'),
    ({'model__decoder__mlp_width': 64}, 'model.decoder.mlp_width'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=name):
      start(
        folder, runs, 'cpt', stage__cpt__init_from='@mixed/mixed', **changes
      )


def test_an_arm_that_fails_lets_the_others_run(
  folder, tmp_path, capsys, monkeypatch
):
  """Missing predecessor and one that does not fit; the good arm is judged."""
  (tmp_path / 'claims.toml').write_text(EMPTY_CLAIMS)
  cfg = toy_run.config(folder, evals=('copying',))
  cfg = with_arms(
    dataclasses.replace(
      cfg,
      repro=dataclasses.replace(
        cfg.repro, claims=str(tmp_path / 'claims.toml')
      ),
    ),
    main=arm(('lm',)),
    lost=arm(('cpt',), (), ('stage.cpt.init_from=@nowhere/lm',)),
    misfit=arm(
      ('cpt',),
      (),
      ('stage.cpt.init_from=@main/lm', 'model.decoder.mlp_width=64'),
    ),
  )
  workdir = str(tmp_path / 'run')
  with pytest.raises(UserError, match='2 of 3 arms failed') as e:
    repro.run(cfg, workdir)
  assert 'seed0/lost' in str(e.value) and 'seed0/misfit' in str(e.value)
  out = capsys.readouterr().out
  assert 'there is no checkpoint in' in out
  assert 'model.decoder.mlp_width is 32 there and 64 here' in out
  assert os.path.exists(f'{workdir}/RESULTS.md')
  done = files.read_json(f'{workdir}/seed0/main/results.json')
  assert list(done['stages']) == ['lm']
  documents = files.read_json(f'{workdir}/seed0/main/documents.json')
  assert documents['corpus'] == done['corpus']
  # The means of documents are what the STATs were made of.
  ((dataset, rows),) = done['evals']['copying'].items()
  stored = documents['evals']['copying'][dataset]['rows']
  for row, columns in stored.items():
    for column, values in columns.items():
      stat = results.stat(np.array(values))
      for key in ('mean', 'se', 'n'):
        np.testing.assert_allclose(stat[key], rows[row][column][key], rtol=1e-4)
  # The second call trains nothing again, and says so of no other command.
  before = [
    os.path.getmtime(f'{workdir}/seed0/main/{name}.json')
    for name in ('results', 'config')
  ]
  monkeypatch.setattr(sys, 'argv', ['main', '--second'])
  with pytest.raises(UserError, match='2 of 3 arms failed'):
    repro.run(cfg, workdir)
  assert before == [
    os.path.getmtime(f'{workdir}/seed0/main/{name}.json')
    for name in ('results', 'config')
  ]
  lost = files.read_json(f'{workdir}/seed0/lost/config.json')
  assert lost['command_line'][-1] == '--second'


@pytest.fixture(scope='module')
def chained(folder, tmp_path_factory):
  """Two arms, of which one starts from the other, and where they were run."""
  root = tmp_path_factory.mktemp('chained')
  (root / 'claims.toml').write_text(EMPTY_CLAIMS)
  cfg = toy_run.config(
    folder, evals=('copying',), repro__claims=str(root / 'claims.toml')
  )
  arms = {
    'main': arm(('lm', 'reconstruct')),
    'next': arm(('cpt',), (), ('stage.cpt.init_from=@main/lm',)),
  }
  cfg = with_arms(cfg, **arms)
  repro.run(cfg, str(root / 'whole'))
  return cfg, root / 'whole'


@pytest.mark.slow
@pytest.mark.parametrize('lost', [('checkpoints', 'stages'), ('checkpoints',)])
def test_a_source_without_checkpoint_is_trained_again(
  chained, tmp_path, capsys, lost
):
  """Records came from elsewhere; the numbers that follow are the same."""
  cfg, whole = chained
  moved = tmp_path / 'moved'
  shutil.copytree(whole, moved)
  for name in lost:
    shutil.rmtree(moved / 'seed0' / 'main' / name)
  shutil.rmtree(moved / 'seed0' / 'next')
  record = (moved / 'seed0' / 'main' / 'results.json').read_text()
  capsys.readouterr()
  repro.run(cfg, str(moved))
  assert 'main/lm has its record but no checkpoint' in capsys.readouterr().out
  assert (moved / 'seed0' / 'main' / 'results.json').read_text() == record
  assert not (moved / 'seed0/main/checkpoints/reconstruct').exists()
  there, here = (
    files.read_json(root / 'seed0' / 'next' / 'results.json')
    for root in (whole, moved)
  )
  assert (
    here['stages']['cpt']['heldout_after']
    == (there['stages']['cpt']['heldout_after'])
  )


def test_a_stop_is_no_failure(folder, tmp_path, monkeypatch):
  (tmp_path / 'claims.toml').write_text(EMPTY_CLAIMS)
  cfg = toy_run.config(folder)
  section = dataclasses.replace(cfg.repro, claims=str(tmp_path / 'claims.toml'))
  cfg = with_arms(dataclasses.replace(cfg, repro=section), main=arm(('lm',)))

  def stopped(*_):
    raise Stopped('stopped in stage lm')

  monkeypatch.setattr(training, 'run', stopped)
  with pytest.raises(Stopped):
    repro.run(cfg, str(tmp_path / 'run'))


def test_two_runs_share_a_workdir_and_no_arm(folder, tmp_path, monkeypatch):
  """As arms are spread over machines; each run holds the one that it is at."""
  (tmp_path / 'claims.toml').write_text(EMPTY_CLAIMS)
  cfg = toy_run.config(folder, repro__claims=str(tmp_path / 'claims.toml'))
  cfg = with_arms(
    cfg, main=arm(('lm',)), other=arm(('lm',)),
    after=arm(('cpt',), (), ('stage.cpt.init_from=@main/lm',)),
  )  # fmt: skip
  trained = []

  def trains(_, folder):
    with pytest.raises(UserError, match='is held by another run'):
      with workdir.held(folder):
        pass
    trained.append(os.path.basename(folder))

  monkeypatch.setattr(training, 'run', trains)
  run = tmp_path / 'run'
  with workdir.held(str(run / 'seed0' / 'main')):
    os.makedirs(run / 'seed0' / 'main' / 'checkpoints' / 'lm' / '3')  # so far
    failed = r'2 of 3 arms failed \(seed0/main, seed0/after\)'
    with pytest.raises(UserError, match=failed):
      repro.run(cfg, str(run))
  assert trained == ['other']
  report = (run / 'RESULTS.md').read_text()
  assert 'is held by another run' in report
  assert 'main/lm, which this arm starts from, is not trained to its' in report
  # Nothing of the held arm was touched.
  assert set(os.listdir(run / 'seed0' / 'main')) == {
    'checkpoints',
    workdir.NAME,
  }


def test_claims_that_cannot_be_read(folder, tmp_path):
  cfg = toy_run.config(folder)
  with pytest.raises(UserError, match='config.repro.claims names no file'):
    repro.run(cfg, str(tmp_path))
  with pytest.raises(UserError, match='No such file'):
    repro.read_claims(str(tmp_path / 'none.toml'))
  (tmp_path / 'bad.toml').write_text('a = [')
  with pytest.raises(UserError, match='is no TOML'):
    repro.read_claims(str(tmp_path / 'bad.toml'))


def test_claims_of_another_config_are_refused_before_the_runs(folder, tmp_path):
  path = f'{ROOT}/configs/claims.toml'
  cfg = toy_run.config(folder, repro__claims=path)
  cfg = with_arms(cfg, main=arm(('lm',)))
  with pytest.raises(UserError, match=r'has no \[preset.toy_run\]'):
    repro.run(cfg, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_the_claims_of_the_project_are_toml():
  with open(os.path.join(ROOT, 'configs', 'claims.toml'), 'rb') as f:
    assert len(tomllib.load(f)['claim']) == 10
