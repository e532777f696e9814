"""The loop: what a stage starts from, resumes bitwise, refuses, compiles."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import toy_config
import toy_run
from toy_run import one_device  # noqa: F401

from refrag_jax import (
  checkpoint,
  compilation,
  evaluate,
  heldout,
  lineage,
  optimizer,
  samples,
  sharding,
  train,
)
from refrag_jax import run as training
from refrag_jax.data import pipeline
from refrag_jax.errors import NonFinite, Stopped, UserError
from refrag_jax.runtime import files, metrics
from refrag_jax.runtime.environment import ROOT
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import row_keys

# Of a log line: what a clock says, and so differs in every run.
CLOCK = ('time', 'step_s', 'tokens_per_s', 'mfu')


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  """A resumed run finds its programs in the cache, as on a real machine."""
  directory = tmp_path_factory.mktemp('xla')
  with toy_run.compile_cache(directory):
    yield directory


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return toy_config.write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def session(folder):
  """Six steps of `lm`, a checkpoint every two; grpo starts from scratch too."""
  cfg = toy_run.config(
    folder,
    checkpoint_every_steps=2,
    eval_every_steps=3,
    sample_every_steps=3,
    stage__lm__num_train_steps=6,
    stage__mixed__num_train_steps=6,
    stage__mixed__expand_fractions=(0.25, 0.5),
    stage__mixed__init_from=os.path.join(folder, 'lm', 'checkpoints', 'lm'),
  )
  return toy_run.open_session(cfg, f'{folder}/lm', toy_run.mesh())


@pytest.fixture(scope='module')
def whole(session):
  """name -> workdir of that stage, trained without interruption."""

  @functools.cache
  def run(name):
    if name != 'lm':
      run('lm')
    return toy_run.train(
      session, name, workdir=f'{session.workdir[:-3]}/{name}'
    )

  return run


def last_state(session, workdir, name) -> TrainState:
  """The newest checkpoint, moments included."""
  abstract = compilation.abstract_state(session, name)
  directory = os.path.join(workdir, 'checkpoints', name)
  _, state, _ = checkpoint.restore(directory, abstract)
  return jax.tree.map(np.asarray, state)


def lines(workdir, file='metrics.jsonl') -> list[dict]:
  return [
    {key: value for key, value in line.items() if key not in CLOCK}
    for line in files.read_lines(os.path.join(workdir, file))
  ]


def assert_same_run(session, workdir, whole, name, stops=()):
  """Bitwise the parameters, moments, samples, log lines and the record.

  A stop leaves one more line of each kind, at the step where it came.
  """
  jax.tree.map(
    np.testing.assert_array_equal,
    last_state(session, workdir, name),
    last_state(session, whole, name),
  )
  got, want = lines(workdir), lines(whole)
  extra = [line for line in got if line not in want]
  assert [line for line in got if line in want] == want
  assert {line['step'] for line in extra} <= set(stops)
  assert {line['split'] for line in extra} <= {'heldout'}
  file = 'samples.jsonl'
  assert lines(workdir, file) == lines(whole, file)
  record, expected = (
    files.read_json(os.path.join(path, 'stages', f'{name}.json'))
    for path in (workdir, whole)
  )
  for key in ('heldout_before', 'heldout_after', 'paired_gain', 'settings'):
    assert record[key] == expected[key]


@pytest.mark.parametrize(
  ('name', 'stops'),
  [
    ('lm', (1,)),
    pytest.param('lm', (2, 3, 5), marks=pytest.mark.slow),
    pytest.param('mixed', (3,), marks=pytest.mark.slow),
  ],
)
def test_a_stopped_stage_ends_where_the_whole_one_ends(
  session, whole, tmp_path, name, stops
):
  reference = whole(name)
  for stop in stops:
    with pytest.raises(Stopped, match=f'stage {name} at step {stop}, state'):
      toy_run.train(session, name, stop, str(tmp_path))
  toy_run.train(session, name, workdir=str(tmp_path))
  assert_same_run(session, tmp_path, reference, name, stops)


@pytest.mark.parametrize(
  ('name', 'accumulation_steps'),
  [
    ('grpo', 4),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [('grpo', 1), *itertools.product(('cpt', 'mixed'), (1, 4))]
    ),
  ],
)
def test_the_held_out_measure_is_in_pieces_of_a_step(
  session, monkeypatch, accumulation_steps, name
):
  """So a step that fits into memory comes with a measure that does.

  What it draws belongs to a row, not to the piece that the row is in.
  """
  cfg = session.config.stage[name]
  size = cfg.batch_size // accumulation_steps
  stage = dataclasses.replace(cfg, accumulation_steps=accumulation_steps)
  config = toy_run.replaced(
    session.config, stage=session.config.stage | {name: stage}
  )
  evaluate, seen = STAGES[name].evaluate, []

  def watched(model, params, batch, *rest):
    seen.append(len(batch['doc_B']))
    return evaluate(model, params, batch, *rest)

  watched_stage = dataclasses.replace(STAGES[name])
  object.__setattr__(watched_stage, 'evaluate', watched)
  monkeypatch.setitem(STAGES, name, watched_stage)
  monkeypatch.setattr(heldout, 'HELDOUT_ROWS', 2 * size + 3)
  params = toy_run.fresh_params(session)
  with jax.set_mesh(session.mesh):
    fixed = heldout.fixed_heldout(session._replace(config=config), name)
    found_B = fixed.measure(params)
    rows = len(fixed.batch['doc_B'])
    keys_B = row_keys(jax.random.key(config.seed), rows)
    chunks = fixed.batch['chunks_BCK'].shape[1]
    variants = STAGES[name].context.variants(cfg, chunks)
    whole_B = np.mean(
      [
        jax.jit(
          lambda batch, v=v: evaluate(
            session.model, params, batch, keys_B, v, cfg
          )
        )(fixed.batch)
        for v in variants
      ],
      axis=0,
    )
  assert seen == [size] * len(variants)
  assert rows % size and found_B.shape == (rows,)
  np.testing.assert_allclose(found_B, whole_B, rtol=2e-6)
  assert len(set(found_B.tolist())) == rows


class LateVote(sharding.Vote):
  """One process that hears its answers a call later, as several do."""

  heard = None

  def __call__(self, *said):
    heard, self.heard = self.heard, said
    return heard or (False,) * len(said)


@pytest.mark.parametrize(
  ('vote', 'seconds', 'steps'),
  [
    (sharding.Vote, 1e9, [6]),
    (LateVote, 1e9, [6]),
    # Due at each step: one is left out behind a save, as what was said before
    # it was said of the time before.
    (sharding.Vote, 0.0, [1, 3, 5, 6]),
    (LateVote, 0.0, [2, 4, 6]),
  ],
)
def test_checkpoints_by_the_clock(
  session, tmp_path, monkeypatch, vote, seconds, steps
):
  saved, save = [], checkpoint.save
  monkeypatch.setattr(sharding, 'Vote', vote)
  monkeypatch.setattr(
    checkpoint, 'save',
    lambda manager, step, *rest: (
      saved.append(step), save(manager, step, *rest)
    ),
  )  # fmt: skip
  cfg = toy_run.replaced(
    session.config, checkpoint_every_seconds=seconds, checkpoint_every_steps=0
  )
  toy_run.train(session._replace(config=cfg), 'lm', workdir=str(tmp_path))
  assert saved == steps


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run_at_the_next_step(
  session, tmp_path, monkeypatch
):
  """As on a full disk, in the background: not at the next save."""
  saved, save = [], checkpoint.save
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)

  def failing(manager, step, *rest):
    saved.append(step)
    if step == 4:
      resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    save(manager, step, *rest)
    time.sleep(1)

  monkeypatch.setattr(checkpoint, 'save', failing)
  cfg = toy_run.replaced(session.config, checkpoint_every_steps=2)
  session = toy_run.with_stage(
    session._replace(config=cfg), 'lm', num_train_steps=8
  )
  steps = []
  monkeypatch.setattr(
    train, 'check_finite', lambda pending, *_: steps.append(pending)
  )
  try:
    with pytest.raises((OSError, ValueError), match='File too large'):
      toy_run.train(session, 'lm', workdir=str(tmp_path))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert saved == [2, 4]
  assert steps[-1][0] == 3  # the fifth step was not counted
  directory = tmp_path / 'checkpoints' / 'lm'
  assert checkpoint.latest_step(directory) == 2
  monkeypatch.undo()
  toy_run.train(session, 'lm', workdir=str(tmp_path))
  assert checkpoint.latest_step(directory) == 8


@pytest.mark.parametrize('at', ['start', 'start_state', 'between', 'after'])
def test_a_stop_before_the_first_step_is_heard(
  session, tmp_path, monkeypatch, at
):
  """In a stage's start, between two compilations, before its first step."""
  stop, compiled = threading.Event(), []

  def then(function):
    def call(*args):
      out = function(*args)
      stop.set()
      return out

    return call

  if at == 'start':
    stop.set()
  elif at == 'start_state':
    monkeypatch.setattr(train, 'start_state', then(train.start_state))
  elif at == 'between':
    monkeypatch.setattr(compilation, 'trace_step', then(compilation.trace_step))
  else:
    monkeypatch.setattr(
      compilation.flops, 'count', then(compilation.flops.count)
    )
  batches = lambda *args: compiled.append(args) or iter(())
  monkeypatch.setattr(pipeline, 'batches', batches)
  fresh = toy_run.fresh_params(session)
  monkeypatch.setattr(lineage, 'initial_params', lambda *_: fresh)
  monkeypatch.setattr(lineage, 'groups_after', lambda *_: {'decoder'})
  session = session._replace(workdir=str(tmp_path))
  writer = metrics.Writer(str(tmp_path))
  with jax.set_mesh(session.mesh), contextlib.closing(writer):
    with pytest.raises(Stopped, match='before its first step'):
      train.train_stage(session, 'cpt', writer, stop, None)
  assert not compiled


def finished_run(tmp_path, **changes):
  folder = toy_config.write_data(tmp_path)
  cfg = toy_run.config(
    folder,
    **{'stages': ('lm', 'reconstruct'), 'evals': ('copying', 'reconstruction'),
       'stage__lm__num_train_steps': 2,
       'stage__reconstruct__num_train_steps': 2} | changes,
  )  # fmt: skip
  workdir = str(tmp_path / 'run')
  training.run(cfg, workdir)
  return cfg, workdir, files.read_json(f'{workdir}/results.json')


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  return finished_run(tmp_path_factory.mktemp('done'))


def copied(done, tmp_path):
  cfg, workdir, numbers = done
  shutil.copytree(workdir, tmp_path / 'run')
  return cfg, str(tmp_path / 'run'), numbers


def evals_run(monkeypatch):
  """The evals that are really run from here on."""
  seen = []
  run_evals = evaluate.run_evals
  monkeypatch.setattr(
    evaluate, 'run_evals',
    lambda *args: seen.append(tuple(args[3])) or run_evals(*args),
  )  # fmt: skip
  return seen


def test_a_finished_run_is_done(done, tmp_path, monkeypatch, capsys):
  cfg, workdir, _ = copied(done, tmp_path)
  monkeypatch.setattr(training, 'run_stages', None)
  training.run(cfg, workdir)
  assert 'all done' in capsys.readouterr().out


@pytest.mark.parametrize(
  'gone', [pytest.param('checkpoints', marks=pytest.mark.slow), 'both']
)
def test_what_was_deleted_is_made_again(
  done, tmp_path, monkeypatch, capsys, gone
):
  """As the error message advises; and where the checkpoint alone is gone."""
  cfg, workdir, numbers = copied(done, tmp_path)
  shutil.rmtree(f'{workdir}/checkpoints/reconstruct')
  if gone == 'both':
    os.remove(f'{workdir}/stages/reconstruct.json')
  seen = evals_run(monkeypatch)
  training.run(cfg, workdir)
  said = capsys.readouterr().out
  assert 'lm  done before' in said and 'all done' not in said
  assert ('no checkpoint: trained again' in said) == (gone == 'checkpoints')
  assert checkpoint.latest_step(f'{workdir}/checkpoints/reconstruct') == 2
  assert seen == [('copying', 'reconstruction')]
  again = files.read_json(f'{workdir}/results.json')
  assert again['evals'] == numbers['evals']  # training is a function of these
  # Trained again for fewer evals, the others' documents go with their results.
  shutil.rmtree(f'{workdir}/checkpoints/reconstruct')
  training.run(toy_run.replaced(cfg, evals=('copying',)), workdir)
  documents = files.read_json(f'{workdir}/documents.json')
  assert list(documents['evals']) == ['copying']


def test_fewer_evals_throw_no_result_away(done, tmp_path, monkeypatch):
  cfg, workdir, numbers = copied(done, tmp_path)
  numbers = numbers | {'date': '2025-09-01 12:00 UTC'}  # of a while ago
  files.write_json(f'{workdir}/results.json', numbers)
  seen = evals_run(monkeypatch)
  training.run(toy_run.replaced(cfg, evals=('copying',)), workdir)
  assert files.read_json(f'{workdir}/results.json') == numbers
  more = toy_run.replaced(
    cfg, evals=('copying', 'regeneration'), log_every_steps=5,
    checkpoint_every_steps=1,
  )  # fmt: skip
  training.run(more, workdir)
  assert seen == [('regeneration',)]
  after = files.read_json(f'{workdir}/results.json')
  assert after['evals'].keys() == {'copying', 'reconstruction', 'regeneration'}
  # What made the others is still said, and of the new one apart.
  assert after['date'] == numbers['date']
  assert after['added'].keys() == {'regeneration'}
  documents = files.read_json(f'{workdir}/documents.json')
  assert documents['evals'].keys() == after['evals'].keys()
  assert documents['fingerprint'] == after['fingerprint']
  for name in numbers['evals']:
    assert after['evals'][name] == numbers['evals'][name]


def test_a_stopped_eval_takes_none_before_it_along(done, tmp_path, monkeypatch):
  cfg, workdir, numbers = copied(done, tmp_path)
  for name in ('results.json', 'documents.json'):
    os.remove(f'{workdir}/{name}')

  def stopped(_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    second = evaluate.EVALS['reconstruction']
    patch.setitem(
      evaluate.EVALS, 'reconstruction', second._replace(run=stopped)
    )
    with pytest.raises(KeyboardInterrupt):
      training.run(cfg, workdir)
  assert list(files.read_json(f'{workdir}/results.json')['evals']) == [
    'copying'
  ]
  seen = evals_run(monkeypatch)
  training.run(cfg, workdir)
  assert seen == [('reconstruction',)]
  assert files.read_json(f'{workdir}/results.json')['evals'] == numbers['evals']


def test_what_is_only_seen_makes_no_result_stale(done, tmp_path, monkeypatch):
  cfg, workdir, _ = copied(done, tmp_path)
  monkeypatch.setattr(training, 'run_stages', None)
  changed = toy_run.replaced(
    cfg, log_every_steps=7, sample_every_steps=-1, checkpoint_every_seconds=9.0,
  )  # fmt: skip
  training.run(changed, workdir)
  for name in evaluate.UNSEEN:
    assert hasattr(cfg, name)


def test_other_text_under_the_same_name_is_not_done(tmp_path):
  cfg, workdir, _ = finished_run(tmp_path, stages=('lm',), evals=('copying',))
  with open(cfg.data.text[0], 'a') as f:
    f.write(json.dumps({'text': 'One more document. ' * 9}) + '\n')
  with pytest.raises(UserError, match='corpus was'):
    training.run(cfg, workdir)


def test_a_stage_goes_on_longer_from_its_last_state(
  session, whole, tmp_path, capsys
):
  """Said and recorded; the schedule begins anew, and what follows is stale."""
  shutil.copytree(whole('lm'), tmp_path / 'run')
  longer = toy_run.with_stage(
    session._replace(workdir=str(tmp_path / 'run')), 'lm', num_train_steps=8
  )
  toy_run.train(longer, 'lm')
  assert 'goes on from step 6 to 8' in capsys.readouterr().out
  record = lineage.finished(longer.workdir, 'lm')
  assert record['steps'] == 8 and record['schedules'] == [0, 6]
  rates = {
    line['step']: line['learning_rate']
    for line in lines(longer.workdir)
    if line['split'] == 'train'
  }
  peak = longer.config.stage['lm'].peak_learning_rate
  assert rates[7] == pytest.approx(peak) and rates[6] < peak / 2
  shorter = toy_run.with_stage(longer, 'lm', num_train_steps=7)
  with pytest.raises(UserError, match='num_train_steps was 8'):
    toy_run.train(shorter, 'lm')


def test_a_predecessor_trained_again_is_said_in_words():
  old = {'starts_from': '0' * 16, 'seed': 0}
  with pytest.raises(UserError, match='mixed was trained from another cpt'):
    lineage.check_settings(old, old | {'starts_from': '1' * 16}, 'mixed')


def test_other_questions_under_the_same_name_are_other_settings(
  session, tmp_path
):
  """Changed answers resumed without a word."""
  path = tmp_path / 'q.jsonl'
  (own,) = session.config.data.questions
  shutil.copyfile(own, path)
  data = dataclasses.replace(session.config.data, questions=(str(path),))
  cfg = toy_run.replaced(session.config, data=data)
  mine = session._replace(config=cfg, workdir=str(tmp_path))
  old = lineage.stage_settings(mine, 'sft')
  lineage.check_settings(old, lineage.stage_settings(mine, 'sft'), 'sft')
  path.write_text(path.read_text().replace('"answers": ["', '"answers": ["x'))
  with pytest.raises(UserError, match='questions_content was'):
    lineage.check_settings(old, lineage.stage_settings(mine, 'sft'), 'sft')
  done = {'contents': {'questions': old['questions_content']}}
  asked = mine._replace(config=toy_run.replaced(cfg, evals=('qa',)))
  assert not evaluate.is_of_contents(done, asked)
  # A file that has only moved is the same.
  moved = dataclasses.replace(data, questions=(own,))
  moved = mine._replace(config=toy_run.replaced(cfg, data=moved))
  lineage.check_settings(old, lineage.stage_settings(moved, 'sft'), 'sft')


def test_a_stop_during_the_last_step_ends_the_stage(session, whole, tmp_path):
  toy_run.train(session, 'lm', 6, str(tmp_path))
  assert_same_run(session, tmp_path, whole('lm'), 'lm')


@pytest.mark.parametrize(
  ('module', 'function', 'call'),
  [
    pytest.param(samples, 'rows', 1, marks=pytest.mark.slow),
    (checkpoint, 'save', 2),
    pytest.param(checkpoint, 'save', 3, marks=pytest.mark.slow),
    pytest.param(train, 'stage_record', 1, marks=pytest.mark.slow),
  ],
)
def test_an_error_anywhere_loses_nothing(
  session, whole, tmp_path, monkeypatch, module, function, call
):
  """Samples, saving and the record are made between or after the steps."""
  reference = whole('mixed')
  real, calls = getattr(module, function), []

  def failing(*args):
    calls.append(args)
    if len(calls) == call:
      raise RuntimeError('power cut')
    return real(*args)

  monkeypatch.setattr(module, function, failing)
  with pytest.raises(RuntimeError, match='power cut'):
    toy_run.train(session, 'mixed', workdir=str(tmp_path))
  toy_run.train(session, 'mixed', workdir=str(tmp_path))
  assert_same_run(session, tmp_path, reference, 'mixed')


def test_a_finished_stage_is_left_alone(session, whole, capsys):
  workdir = whole('lm')
  before = lines(workdir)
  capsys.readouterr()  # the whole run's own lines, where this test is the first
  toy_run.train(session, 'lm', workdir=workdir)
  assert capsys.readouterr().out == 'lm  done before\n'
  assert lines(workdir) == before


@pytest.mark.parametrize('stop', [0, 2])
def test_changed_settings_are_refused(session, tmp_path, stop):
  """Whether the stage is finished or has only begun."""
  if stop:
    with pytest.raises(Stopped):
      toy_run.train(session, 'lm', stop, str(tmp_path))
  else:
    toy_run.train(session, 'lm', workdir=str(tmp_path))
  before = lines(tmp_path)
  for changed, named in (
    (toy_run.with_stage(session, 'lm', batch_size=4), 'batch_size was 8 and'),
    (
      session._replace(config=dataclasses.replace(session.config, seed=5)),
      'seed was 0 and is 5',
    ),
  ):
    with pytest.raises(UserError, match=named) as e:
      toy_run.train(changed, 'lm', workdir=str(tmp_path))
    assert '\n' not in str(e.value)
    assert '--workdir' in str(e.value)
  assert lines(tmp_path) == before


@pytest.mark.parametrize('name', [n for n in STAGES if STAGES[n].predecessor])
def test_a_missing_predecessor_is_named(folder, tmp_path, name):
  cfg = toy_run.config(folder)
  session = toy_run.open_session(cfg, tmp_path, toy_run.mesh())
  with pytest.raises(UserError) as e:
    lineage.init_from(session, name)
  message = str(e.value)
  predecessor = STAGES[name].predecessor
  assert f'put {predecessor} before it in config.stages' in message
  assert f'--config.stage.{name}.init_from=DIR' in message
  assert '\n' not in message


def test_a_half_trained_predecessor_is_no_predecessor(session, tmp_path):
  with pytest.raises(Stopped):
    toy_run.train(session, 'lm', 2, str(tmp_path))
  with pytest.raises(UserError, match='starts from a finished lm'):
    toy_run.train(session, 'reconstruct', workdir=str(tmp_path))
  assert not os.path.exists(tmp_path / 'checkpoints' / 'reconstruct')


def test_init_from_overrides_the_predecessor(session, whole, tmp_path):
  """`mixed` starts from `lm` here; only the fresh projection is rescaled."""
  lm = last_state(session, whole('lm'), 'lm').params
  start = lineage.initial_params(session, 'mixed')
  for group in ('decoder', 'encoder', 'policy'):
    jax.tree.map(np.testing.assert_array_equal, start[group], lm[group])
  # That of config.init_from is for the run's first stage alone.
  elsewhere = toy_run.open_session(
    toy_run.replaced(session.config, stages=('cpt', 'grpo'), init_from='/x'),
    tmp_path,
    session.mesh,
  )
  assert lineage.init_from(elsewhere, 'cpt') == '/x'
  with pytest.raises(UserError, match='put mixed before it'):
    lineage.init_from(elsewhere, 'grpo')
  with pytest.raises(UserError, match='there is no checkpoint in /x'):
    lineage.initial_params(elsewhere, 'cpt')


def test_a_checkpoint_of_another_shape_is_refused(session, whole, folder):
  path = os.path.join(whole('lm'), 'checkpoints', 'lm')
  other = toy_run.open_session(
    toy_run.config(
      folder, model__decoder__width=32, stage__cpt__init_from=path
    ),
    f'{folder}/other',
    session.mesh,
  )
  with pytest.raises(UserError, match=r'decoder.width is 16 there and 32 here'):
    lineage.initial_params(other, 'cpt')


def test_steps_compile_once_per_shape_and_variant(folder, tmp_path):
  """And nothing at all compiles from the second step to the last but one.

  Logs, evaluations and checkpoints lie between them.
  """
  cfg = toy_run.config(
    folder,
    eval_every_steps=2,
    checkpoint_every_steps=3,
    sample_every_steps=4,
    stage__cpt_trained__num_train_steps=12,
    stage__cpt_trained__factors=(1, 4),
  )
  session = toy_run.open_session(cfg, tmp_path, toy_run.mesh())
  keys = compilation.step_keys(session, 'cpt_trained')
  assert len(set(keys)) > 3  # factors and contexts
  at_step = []
  fresh = toy_run.fresh_params(session)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lineage, 'initial_params', lambda *_: fresh)
    patch.setattr(lineage, 'groups_after', lambda *_: {'decoder'})
    learning_rate = optimizer.learning_rate
    patch.setattr(
      optimizer,
      'learning_rate',
      lambda *args: at_step.append(len(seen)) or learning_rate(*args),
    )
    with toy_run.watch_compiles() as seen:
      toy_run.train(session, 'cpt_trained')
  names = [name for name, _ in seen]
  assert sum('train_step' in name for name in names) == len(set(keys))
  assert sum('measure' in name for name in names) == 1
  # The first four steps bring each kind of work for the first time.
  assert len(at_step) == 12
  assert names[at_step[4] : at_step[-1]] == []


def test_what_this_process_has_traced_before_is_found_again(folder, tmp_path):
  """By another session of the same config: an arm, a stage that goes on."""
  cfg = toy_run.config(folder)
  for _ in range(2):
    session = toy_run.open_session(cfg, tmp_path, toy_run.mesh())
    state = compilation.abstract_state(session, 'lm')
    with toy_run.watch_compiles() as seen:
      compilation.compile_stage(session, 'lm', state, 0)
      params = toy_run.fresh_params(session)
      heldout.fixed_heldout(session, 'lm').measure(params)
  assert [name for name, _ in seen] == []


def poisoned(params):
  bad = params['decoder']['norm']['scale'].at[3].set(np.nan)
  decoder = params['decoder'] | {'norm': {'scale': bad}}
  return params | {'decoder': decoder}


def test_non_finite_at_the_start(session, tmp_path, monkeypatch):
  fresh = toy_run.fresh_params(session)
  monkeypatch.setattr(lineage, 'initial_params', lambda *_: poisoned(fresh))
  with pytest.raises(NonFinite) as e:
    toy_run.train(session, 'lm', workdir=str(tmp_path))
  message = str(e.value)
  assert 'stage lm: loss nan' in message and 'at step 1;' in message
  assert 'last good checkpoint: none' in message
  assert '\n' not in message
  assert not os.listdir(tmp_path / 'checkpoints' / 'lm')
  assert not os.path.exists(tmp_path / 'stages')


def test_non_finite_later_names_the_batch_and_keeps_the_checkpoint(
  session, whole, tmp_path, monkeypatch
):
  reference = whole('mixed')
  with pytest.raises(Stopped):
    toy_run.train(session, 'mixed', 2, str(tmp_path))
  restore = checkpoint.restore

  def restore_poisoned(*args):
    step, state, meta = restore(*args)
    return step, state.replace(params=poisoned(state.params)), meta

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, 'restore', restore_poisoned)
    with pytest.raises(NonFinite) as e:
      toy_run.train(session, 'mixed', workdir=str(tmp_path))
  assert 'at step 3;' in str(e.value)
  assert 'last good checkpoint: step 2' in str(e.value)
  batch = train.STAGES['mixed'].sampler(session.config, session.corpus)(
    2, np.arange(8)
  )
  assert f'batch ids {batch["id_B"].tolist()}' in str(e.value)
  # What was saved before is whole: from there the run ends as it should.
  toy_run.train(session, 'mixed', workdir=str(tmp_path))
  assert_same_run(session, tmp_path, reference, 'mixed', stops=(2,))


def test_frozen_unchanged_is_measured(session, whole):
  """Not promised: a run whose frozen groups moved says so."""
  name = 'mixed'
  workdir = whole(name)
  params = last_state(session, workdir, name).params
  fixed = heldout.Heldout({'doc_B': np.arange(4)}, None)
  frozen = lineage.frozen_checksums(
    params, train.STAGES[name], session.config.stage[name]
  )
  meta = {
    'before_B': [1.0] * 4, 'wall_s': 0.0, 'compile_s': 0.0, 'frozen': frozen,
  }  # fmt: skip
  ready = train.Ready(0, None, meta, fixed, None)
  record = lambda params: train.stage_record(
    session, name, ready, params, np.zeros(4)
  )
  assert record(params)['frozen_unchanged'] is True
  moved = jax.tree.map(lambda x: x + 1e-6, params['policy'])
  assert record(params | {'policy': moved})['frozen_unchanged'] is False
  meta['frozen'] = None  # begun by a version with other checksums
  assert record(params)['frozen_unchanged'] is None
  assert record(params)['paired_gain'] == {'mean': 1.0, 'se': 0.0, 'n': 4}


# Runs `main`, killed by a real signal at a named point, and prints what was
# compiled and not found in the persistent cache.
PROGRAM = """
import os, sys
from refrag_jax import main
from refrag_jax.runtime import environment
environment.set_compilation_cache(os.environ)  # as main does, before JAX
import jax

point, signum, *argv = sys.argv[1:]
state, missed = [], []
def event(name, **kwargs):
  if name.startswith('/jax/compilation_cache/cache_'):
    state.append(name.split('_')[-1])
def duration(name, seconds, **kwargs):
  if name == '/jax/core/compile/backend_compile_duration':
    if state.pop() == 'misses':  # else 'hits'
      missed.append(kwargs['fun_name'])

def strike(*args, **kwargs):
  os.kill(os.getpid(), int(signum))

def at(module, name, before=True, call=1):
  real, calls = getattr(module, name), []
  def wrapped(*args, **kwargs):
    calls.append(name)
    if before and len(calls) == call:
      strike()
    value = real(*args, **kwargs)
    if not before and len(calls) == call:
      strike()
    return value
  setattr(module, name, wrapped)

if point:
  from refrag_jax import checkpoint, compilation, evaluate, optimizer
  from refrag_jax.runtime import files
  from refrag_jax import samples
  {
    'first step': lambda: at(optimizer, 'learning_rate'),
    'step 3': lambda: at(optimizer, 'learning_rate', call=3),
    'step 6': lambda: at(optimizer, 'learning_rate', call=6),
    'compiling': lambda: at(compilation, 'compile_stage'),
    'saving': lambda: at(checkpoint, 'save', before=False, call=2),
    'saving the last': lambda: at(checkpoint, 'save', before=False, call=3),
    'sampling': lambda: at(samples, 'rows'),
    'recording': lambda: at(files, 'write_json'),
    'evals': lambda: at(evaluate, 'run_evals'),
  }[point]()
jax.monitoring.register_event_listener(event)
jax.monitoring.register_event_duration_secs_listener(duration)
code = main.main(argv)
print('compiled', sorted(missed))
sys.exit(code)
"""


def command(folder, workdir, cache, point='', signum=signal.SIGTERM, *more):
  """Runs two stages by the command line in a process of its own."""
  script = os.path.join(folder, 'program.py')
  with open(script, 'w') as f:
    f.write(PROGRAM)
  return subprocess.run(
    [
      sys.executable,
      script,
      point,
      str(int(signum)),
      f'--config={ROOT}/tests/helpers/toy_config.py:{folder}',
      f'--workdir={workdir}',
      '--config.stages=lm,cpt_trained',
      '--config.checkpoint_every_steps=2',
      '--config.stage.lm.num_train_steps=6',
      '--config.stage.cpt.num_train_steps=6',
      *more,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,  # the machine may be busy with other tests
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
    },
  )


@pytest.fixture(scope='module')
def by_command(folder, tmp_path_factory):
  """The cache and the workdir of a run that nothing interrupted."""
  cache, workdir = tmp_path_factory.mktemp('xla2'), f'{folder}/by_command'
  done = command(folder, workdir, cache)
  assert done.returncode == 0, done.stderr
  return cache, workdir


def assert_same_results(session, workdir, whole, stops=()):
  for name in ('lm', 'cpt_trained'):
    jax.tree.map(
      np.testing.assert_array_equal,
      last_state(session, workdir, name),
      last_state(session, whole, name),
    )
  got, want = lines(workdir), lines(whole)
  assert [line for line in got if line in want] == want
  assert {x['step'] for x in got if x not in want} <= set(stops)
  new, old = (
    files.read_json(os.path.join(path, 'results.json'))['stages']
    for path in (workdir, whole)
  )
  for name in old:
    assert new[name]['heldout_after'] == old[name]['heldout_after']


@pytest.mark.slow
def test_sigterm_then_the_same_command(session, folder, tmp_path, by_command):
  """Exit code 75 and a sentence; then it goes on, and then it is done."""
  cache, whole = by_command
  run = functools.partial(command, folder, tmp_path, cache)
  stopped = run('step 3', signal.SIGTERM)
  assert stopped.returncode == 75, stopped.stderr
  assert stopped.stderr.splitlines()[-1] == (
    'refrag_jax: stopped in stage lm at step 3, state saved; run the same '
    'command to continue'
  )
  again = run()
  assert again.returncode == 0, again.stderr
  assert 'lm  resumes at step 3' in again.stdout
  # What the uninterrupted run compiled is found, in any process.
  assert 'compiled []' in again.stdout, again.stdout.splitlines()[-1]
  assert_same_results(session, tmp_path, whole, stops=(3,))
  third = run()
  assert third.returncode == 0
  assert third.stdout.splitlines()[-2].startswith('all done: ')
  assert 'resumes' not in third.stdout and 'corpus' not in third.stdout


def test_what_fused_is_follows_before_the_model_is_made(folder, tmp_path):
  cfg = toy_run.config(folder, model__attention='fused')
  opened = toy_run.open_session(cfg, tmp_path, toy_run.mesh())
  assert opened.config.model.attention == 'blockwise'
  assert opened.model.cfg.attention == 'blockwise'


def test_a_signal_after_the_last_step_is_heard(folder, tmp_path):
  """Another arm of `--mode=repro` would begin."""
  cfg = toy_run.config(folder, stages=())

  def then(session, stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wait(10)

  with pytest.raises(Stopped, match='at the end of a run'):
    training.run_stages(cfg, str(tmp_path), then)


@pytest.mark.slow
def test_sigkill_anywhere_and_again(session, folder, tmp_path, by_command):
  """Each start goes on with what the one before it left, and is killed too."""
  cache, whole = by_command
  for point in (
    'compiling',
    'first step',
    'step 3',
    'sampling',
    'saving',
    'saving the last',
    'recording',
    'evals',
  ):
    killed = command(folder, tmp_path, cache, point, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    assert not os.path.exists(tmp_path / 'results.json'), point
  again = command(folder, tmp_path, cache)
  assert again.returncode == 0, again.stderr
  assert_same_results(session, tmp_path, whole)


@pytest.mark.slow
def test_an_overflow_is_one_line_and_exit_code_1(folder, tmp_path, by_command):
  done = command(
    folder,
    tmp_path,
    by_command[0],
    '',
    signal.SIGTERM,
    '--config.stages=lm',
    '--config.stage.lm.peak_learning_rate=1e30',
  )
  assert done.returncode == 1, done.stderr
  assert 'Traceback' not in done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith('refrag_jax: stage lm: loss ')
  assert 'batch ids' in last and 'last good checkpoint' in last
