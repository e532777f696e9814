"""Weights & Biases through a stand-in, and traces of JAX's profiler."""

import contextlib
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from refrag_jax.errors import UserError
from refrag_jax.runtime import metrics, profile, wandb


def test_weights_and_biases_gets_the_numbers_of_each_stage(
  tmp_path, monkeypatch
):
  calls = []
  run = types.SimpleNamespace(
    log=lambda values: calls.append(values),
    finish=lambda: calls.append('finished'),
  )
  started = {}
  module = types.SimpleNamespace(
    init=lambda **options: started.update(options) or run
  )
  monkeypatch.setitem(sys.modules, 'wandb', module)
  writer = metrics.Writer(str(tmp_path), project='mine')
  writer.scalars('cpt', 3, 'train', {'loss': 1.5, 'expand_rate_C': [0.5]})
  writer.close()
  assert started['project'] == 'mine' and started['resume'] == 'allow'
  assert calls == [{'cpt/train/loss': 1.5, 'cpt/step': 3}, 'finished']


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
