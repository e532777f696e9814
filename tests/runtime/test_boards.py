"""Weights & Biases through a stand-in, and traces of JAX's profiler."""

import contextlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from refrag_jax.errors import UserError
from refrag_jax.runtime import metrics, profile, wandb


class Package(types.ModuleType):
  """A stand-in for wandb that keeps what it was told."""

  class Error(Exception):
    pass

  def __init__(self):
    super().__init__('wandb')
    self.started, self.axes, self.logged, self.ended = [], [], [], 0

  def init(self, **options):
    self.started.append(options)
    return self

  def define_metric(self, name, step_metric):
    self.axes.append((name, step_metric))

  def log(self, values):
    self.logged.append(values)

  def Table(self, columns, data):  # noqa: N802
    return columns, data

  def finish(self):
    self.ended += 1


@pytest.fixture
def package(monkeypatch):
  package = Package()
  monkeypatch.setitem(sys.modules, 'wandb', package)
  return package


def test_weights_and_biases_gets_the_numbers_of_each_stage(tmp_path, package):
  writer = metrics.Writer(tmp_path / 'run', project='mine', config={'seed': 7})
  for stage, step in (('lm', 9), ('cpt', 3), ('cpt', 4)):
    values = {'loss': 1.5, 'expand_rate_C': [0.5], 'other': None}
    writer.scalars(stage, step, 'train', values)
  writer.samples('cpt', 4, [{'source': 'a'}, {'source': 'b', 'output': 'c'}])
  writer.close()
  (started,) = package.started
  assert (started['project'], started['config']) == ('mine', {'seed': 7})
  assert started['dir'] == str(tmp_path / 'run')
  assert package.axes == [('lm/*', 'lm/step'), ('cpt/*', 'cpt/step')]
  assert package.logged == [
    {'lm/train/loss': 1.5, 'lm/step': 9},
    {'cpt/train/loss': 1.5, 'cpt/step': 3},
    {'cpt/train/loss': 1.5, 'cpt/step': 4},
    {
      'cpt/samples': (['source', 'output'], [['a', ''], ['b', 'c']]),
      'cpt/step': 4,
    },
  ]
  assert package.ended == 1


def test_a_workdir_goes_on_with_its_own_run(tmp_path, package):
  """And one of the same name that was made anew does not."""
  for name in ('a', 'a', 'b'):
    metrics.Writer(tmp_path / name, project='mine').close()
  shutil.rmtree(tmp_path / 'a')
  metrics.Writer(tmp_path / 'a', project='mine').close()
  ids = [options['id'] for options in package.started]
  assert ids[0] == ids[1] and len(set(ids)) == 3
  assert all(options['resume'] == 'allow' for options in package.started)


def test_a_start_that_fails_is_a_sentence(tmp_path, package, monkeypatch):
  def init(**options):
    raise package.Error('no API key\nconfigured')

  monkeypatch.setattr(package, 'init', init)
  with pytest.raises(UserError, match='no API key configured; set WANDB_MODE'):
    metrics.Writer(tmp_path, project='mine')


def test_only_process_0_has_a_board(tmp_path, package, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  metrics.Writer(tmp_path, project='mine').close()
  assert not package.started


def test_without_the_package_it_is_a_sentence(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match='pip install wandb'):
    wandb.require()


def files(tmp_path, stage='lm'):
  return [p for p in (tmp_path / 'profile' / stage).rglob('*') if p.is_file()]


@pytest.mark.parametrize('start', [1, 3])  # 3: resumed behind the first
def test_the_steps_asked_for_are_traced(tmp_path, start):
  aside = []

  def excluded(why):
    aside.append(why)
    return contextlib.nullcontext()

  trace = profile.Trace(str(tmp_path), 'lm', (2, 3), excluded)
  for step in range(start, 6):
    with trace.step(step):
      result = jax.jit(lambda x: x + 1)(jnp.ones(2))
    trace.after(step, result)
    assert bool(files(tmp_path)) == (step >= 3)  # written when the last ends
  written = files(tmp_path)
  trace.close()  # nothing is under way
  assert files(tmp_path) == written
  assert aside == ['profile', 'profile']  # what begins and ends it


def test_no_steps_are_no_trace(tmp_path, monkeypatch):
  for steps, process in (((), 0), ((1, 2), 1)):
    monkeypatch.setattr(jax, 'process_index', lambda p=process: p)
    trace = profile.Trace(str(tmp_path), 'lm', steps)
    with trace.step(1):
      pass
    trace.close()
  assert not files(tmp_path)


def test_a_trace_ends_with_a_run_that_is_stopped(tmp_path):
  trace = profile.Trace(str(tmp_path), 'lm', (1, 9))
  with trace.step(1):
    pass
  trace.close()
  assert files(tmp_path)
