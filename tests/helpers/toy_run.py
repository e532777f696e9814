"""Sessions and runs of toy_config.py, for the tests of the loop."""

import contextlib
import dataclasses
import threading

import jax
import pytest
import toy_config
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

from refrag_jax import lineage, resolve, sharding
from refrag_jax import session as session_lib
from refrag_jax import train as train_lib
from refrag_jax.config import schema as config_lib
from refrag_jax.data import pipeline
from refrag_jax.runtime import metrics


def config(folder: str, **changes) -> config_lib.Config:
  """The built config; changes by dotted key, dots written as '__'."""
  c = toy_config.get_config(folder)
  with c.unlocked(), c.ignore_type():
    for key, value in changes.items():
      *parents, last = key.split('__')
      node = c
      for name in parents:
        node = node[name]
      node[last] = value
  return resolve.build(c)


def replaced(config: config_lib.Config, **fields) -> config_lib.Config:
  return dataclasses.replace(config, **fields)


def with_stage(session, name: str, **fields):
  """The session with other fields in one stage's config."""
  stage = dataclasses.replace(session.config.stage[name], **fields)
  stages = session.config.stage | {name: stage}
  return session._replace(config=replaced(session.config, stage=stages))


def mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1
) -> jax.sharding.Mesh:
  """Of the first devices; a run by itself takes all 8 of conftest.py."""
  devices = jax.devices()[: data * fsdp * tensor * sequence]
  return jax.make_mesh(  # not sharding.make_mesh, in whose place this stands
    (data, fsdp, tensor, sequence),
    sharding.MESH_AXES,
    axis_types=(AxisType.Auto,) * 4,
    devices=devices,
  )


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """For a module to import whose runs are of one device, as on most machines.

  Those by themselves take all 8 of conftest.py, and long to compile and save.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda **_: mesh())
    yield


def open_session(cfg: config_lib.Config, workdir, on: jax.sharding.Mesh):
  """A session on a mesh of our choice."""
  opened = session_lib.open_session(cfg, str(workdir))
  return opened._replace(mesh=on)


def fresh_params(session) -> dict:
  """The parameters of a run's first stage."""
  return lineage.initial_params(session, 'lm')


def train(session, name: str, stop_in: int = 0, workdir: str = '') -> str:
  """Trains one stage; a stop request arrives during step `stop_in` (from 1).

  Returns:
    The workdir.
  """
  if workdir:
    session = session._replace(workdir=workdir)
  stop = threading.Event()
  batches = pipeline.batches

  def watched(*args):
    for step, batch in batches(*args):
      if step + 1 == stop_in:
        stop.set()
      yield step, batch

  writer = metrics.Writer(session.workdir)
  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(session.mesh):
    patch.setattr(pipeline, 'batches', watched)
    try:
      train_lib.train_stage(session, name, writer, stop, None)
    finally:
      writer.close()
  return session.workdir


@contextlib.contextmanager
def watch_compiles():
  """Yields a list that grows by (function, found in the persistent cache)."""
  seen, hits = [], []

  def duration(event, seconds, **kwargs):
    del seconds
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append((kwargs.get('fun_name', ''), bool(hits)))
      hits.clear()

  def event(name, **kwargs):
    del kwargs
    if name == '/jax/compilation_cache/cache_hits':
      hits.append(name)

  jax.monitoring.register_event_duration_secs_listener(duration)
  jax.monitoring.register_event_listener(event)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(duration)
    jax.monitoring.unregister_event_listener(event)


@contextlib.contextmanager
def compile_cache(directory):
  """Programs that tests have in common are compiled once, as in real runs."""
  values = {
    'jax_compilation_cache_dir': str(directory),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  old = {name: getattr(jax.config, name) for name in values}
  compilation_cache.reset_cache()
  try:
    for name, value in values.items():
      jax.config.update(name, value)
    yield
  finally:
    for name, value in old.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
