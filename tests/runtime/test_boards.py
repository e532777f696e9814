"""Weights & Biases through a stand-in, and traces of JAX's profiler."""

import os
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


def test_the_steps_asked_for_are_traced(tmp_path, monkeypatch):
  trace = profile.Trace(str(tmp_path), 'lm', (2, 3))
  for step in range(1, 5):
    trace.before(step)
    result = jax.jit(lambda x: x + 1)(jnp.ones(2))
    trace.after(step, result)
    there = os.path.isdir(tmp_path / 'profile' / 'lm')
    assert there == (step >= 3)  # written when the last one has ended
  trace.close()  # nothing is under way


def test_a_trace_ends_with_a_run_that_is_stopped(tmp_path):
  trace = profile.Trace(str(tmp_path), 'lm', (1, 9))
  trace.before(1)
  trace.close()
  assert os.path.isdir(tmp_path / 'profile' / 'lm')
  assert not os.path.isdir(tmp_path / 'none')
