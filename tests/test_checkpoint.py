"""Checkpoints: newest and best kept, whole or absent, on any mesh, refused if
they do not fit."""

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_run

from refrag_jax import checkpoint
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import init_params
from refrag_jax.runtime.environment import ROOT
from refrag_jax.session import with_shardings
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state

META = {
  'stage': 'cpt',
  'model': {'decoder': {'width': 16, 'num_layers': 1}, 'chunk_size': 4},
  'tokenizers': {'decoder': 'aaa', 'encoder': 'bbb'},
}
IDENTITY = {key: META[key] for key in ('model', 'tokenizers')}


def abstract_state(mesh, stage='cpt') -> TrainState:
  """Of a model with every kind of parameter, Adam's moments included."""
  cfg = toy_run.config('unused').model
  params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  opt_state = jax.eval_shape(lambda p: init_opt_state(p, STAGES[stage]), params)
  step = jax.ShapeDtypeStruct((), np.int32)
  return with_shardings(TrainState(step, params, opt_state), mesh)


def random_state(mesh, step: int) -> TrainState:
  """No two leaves alike, so that none can be taken for another."""
  rng = np.random.default_rng(step)

  def draw(shape):
    x = rng.standard_normal(shape.shape).astype(shape.dtype)
    return jax.device_put(x, shape.sharding)

  state = jax.tree.map(draw, abstract_state(mesh))
  return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def assert_same(got, want):
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got),
    jax.tree.leaves(want),
    strict=True,
  ):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), path_str(path))


def small_state(step: int) -> TrainState:
  """A few bytes, for what is about directories."""
  x = jax.numpy.arange(8.0) + step
  return TrainState(jax.numpy.int32(step), {'decoder': {'w': x}}, {'m': x * 2})


def save(manager, step, state, loss=1.0):
  checkpoint.save(manager, step, state, META, loss)
  manager.wait_until_finished()


def steps_on_disk(directory) -> list[str]:
  return sorted(name for name in os.listdir(directory) if name.isdigit())


def test_newest_and_best_are_kept(tmp_path):
  """Also when the metric only worsens, which `max_to_keep` would get wrong."""
  with checkpoint.open_manager(tmp_path) as manager:
    for step, loss in enumerate((1.0, 0.5, 0.7, 0.9), start=1):
      save(manager, step, small_state(step), loss)
    assert manager.all_steps() == [2, 4]
  assert steps_on_disk(tmp_path) == ['2', '4']
  assert checkpoint.latest_step(tmp_path) == 4


def test_the_first_of_worsening_steps_is_kept(tmp_path):
  with checkpoint.open_manager(tmp_path) as manager:
    for step in (1, 2, 3):
      save(manager, step, small_state(step), float(step))
    assert manager.all_steps() == [1, 3]


@pytest.mark.parametrize(
  'onto',
  [
    (2, 2, 2),
    *(
      pytest.param(mesh, marks=pytest.mark.slow)
      for mesh in [(1, 1, 1), (2, 4, 1)]
    ),
  ],
)
def test_restores_bitwise_on_another_mesh(tmp_path, onto):
  """Parameters and moments, from 4 x 2 devices (data x fsdp)."""
  state = random_state(toy_run.mesh(4, 2), 3)
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 3, state)
    abstract = abstract_state(toy_run.mesh(*onto))
    restored = checkpoint.restore(tmp_path, abstract)[1]
  assert_same(restored, state)
  for x, want in zip(
    jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True
  ):
    assert x.sharding.is_equivalent_to(want.sharding, x.ndim)
  params = checkpoint.load_params(tmp_path, abstract.params)
  assert_same(params, state.params)


def test_the_optimizer_state_keeps_its_structure(tmp_path):
  """optax's tuples come back as such, and frozen groups have no moments."""
  mesh = toy_run.mesh()
  state = random_state(mesh, 2)
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 2, state)
    restored = checkpoint.restore(tmp_path, abstract_state(mesh))[1]
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  names = {
    path_str(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(restored.opt_state)
  }
  assert not any('policy/' in name for name in names)
  assert any('mu/decoder/' in name for name in names)
  assert int(restored.step) == 2


def test_meta_is_read_back(tmp_path):
  assert checkpoint.read_meta(tmp_path / 'nothing') is None
  assert checkpoint.latest_step(tmp_path / 'nothing') is None
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 7, small_state(7))
  meta = checkpoint.read_meta(tmp_path)
  digests = meta.pop('digests')
  assert digests.keys() == {'params', 'opt_state'}
  assert meta == META | {'format': checkpoint.FORMAT, 'step': 7, 'loss': 1.0}
  meta['digests'] = digests
  assert checkpoint.require(tmp_path, IDENTITY, 'a test reads') == meta


def changed(*path, to):
  identity = copy.deepcopy(IDENTITY)
  node = identity
  for name in path[:-1]:
    node = node[name]
  node[path[-1]] = to
  return identity


@pytest.mark.parametrize(
  ('identity', 'difference'),
  [
    (
      changed('model', 'decoder', 'width', to=32),
      'model.decoder.width is 16 there and 32 here',
    ),
    (
      changed('model', 'chunk_size', to=8),
      'model.chunk_size is 4 there and 8 here',
    ),
    (
      changed('tokenizers', 'encoder', to='ccc'),
      "tokenizers.encoder is 'bbb' there and 'ccc' here",
    ),
    (
      changed('model', 'decoder', 'new', to=1),
      'model.decoder.new is None there and 1 here',
    ),
  ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, identity, difference):
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 1, small_state(1))
  with pytest.raises(UserError) as e:
    checkpoint.require(tmp_path, identity, "stage 'mixed' starts from it")
  message = str(e.value)
  assert message.startswith("stage 'mixed' starts from it, but ")
  assert difference in message and str(tmp_path) in message
  assert '\n' not in message


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match='there is no checkpoint in'):
    checkpoint.require(tmp_path / 'nothing', IDENTITY, 'why')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='there is no checkpoint in'):
    checkpoint.require(tmp_path / 'empty', IDENTITY, 'why')


def test_another_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'FORMAT', 99)
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 1, small_state(1))
  monkeypatch.undo()
  with pytest.raises(UserError, match='format 99, this version reads 4 and 5'):
    checkpoint.require(tmp_path, IDENTITY, 'why')


def test_two_steps_stay_over_any_number_of_restarts(tmp_path):
  """A manager each, as of a run that was stopped five times."""
  for step, loss in enumerate((1.0, 0.5, 0.7, 0.6, 0.9, 0.8), start=1):
    with checkpoint.open_manager(tmp_path) as manager:
      save(manager, step, small_state(step), loss)
    assert steps_on_disk(tmp_path) == [
      str(s) for s in sorted({min(step, 2), step})
    ]


def test_steps_without_a_loss_are_not_kept_for_it(tmp_path):
  """What older versions have left behind."""
  for step in (1, 2, 3):
    with checkpoint.open_manager(tmp_path / str(step)) as manager:
      save(manager, step, small_state(step))
    (tmp_path / str(step) / str(step)).rename(tmp_path / f'step{step}')
    as_format_4(tmp_path / f'step{step}')
    (tmp_path / str(step)).rmdir()
    (tmp_path / f'step{step}').rename(tmp_path / str(step))
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 4, small_state(4), 5.0)
    save(manager, 5, small_state(5), 6.0)
  assert steps_on_disk(tmp_path) == ['4', '5']


def as_format_4(step):
  """The step as it was written before there were digests."""
  path = step / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  for key in ('digest', 'digests', 'loss'):
    del meta[key]
  path.write_text(json.dumps(meta | {'format': 4}))


def two_steps(directory):
  with checkpoint.open_manager(directory) as manager:
    for step in (1, 2):
      save(manager, step, small_state(step), float(step))


def data_file(step, item='params'):
  """The file with an item's values."""
  files = [path for path in step.rglob('d/*') if item in path.parts]
  return max(files, key=lambda path: path.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def renamed(path):
  """A list of arrays in which one is called otherwise, by one bit."""
  path.write_text(path.read_text().replace('"w"', '"v"').replace("'w'", "'v'"))


@pytest.mark.parametrize(
  ('damage', 'named'),
  [
    (lambda step: flip(data_file(step)), 'params'),
    (lambda step: flip(data_file(step, 'opt_state')), 'opt_state'),
    (lambda step: flip(step / 'meta' / 'metadata'), 'meta'),
    (lambda step: os.truncate(data_file(step), 10), 'params'),
    (lambda step: data_file(step).unlink(), 'params'),
    (lambda step: (step / 'params' / 'manifest.ocdbt').unlink(), 'params'),
    (lambda step: (step / 'meta' / 'metadata').unlink(), 'meta'),
    (lambda step: shutil.rmtree(step / 'opt_state'), 'opt_state'),
    (lambda step: os.truncate(step / 'params' / '_METADATA', 0), 'params'),
    (lambda step: renamed(step / 'params' / '_METADATA'), 'params'),
  ],
)
def test_a_damaged_step_is_named_and_the_one_before_taken(
  tmp_path, capsys, damage, named
):
  two_steps(tmp_path)
  damage(tmp_path / '2')
  step, state, meta = checkpoint.restore(tmp_path, shapes(small_state(0)))
  assert step == meta['step'] == 1
  assert_same(state, small_state(1))
  said = capsys.readouterr().out
  assert f'checkpoint {tmp_path}/2 is damaged or incomplete ({named}' in (
    said.replace('array decoder/w in params', 'params')
    .replace('array decoder/w is missing in params', 'params')
    .replace('array m in opt_state', 'opt_state')
  )
  assert f'reading {tmp_path}/1 instead' in said
  assert 'Traceback' not in said
  # The run goes on from there, and saves that step again.
  assert steps_on_disk(tmp_path) == ['1']
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 2, small_state(2), 2.0)
  assert checkpoint.restore(tmp_path, shapes(small_state(0)))[0] == 2


def test_the_same_step_may_be_damaged_twice(tmp_path):
  two_steps(tmp_path)
  for _ in range(2):
    flip(data_file(tmp_path / '2'))
    assert checkpoint.restore(tmp_path, shapes(small_state(0)))[0] == 1
    with checkpoint.open_manager(tmp_path) as manager:
      save(manager, 2, small_state(2), 2.0)
  assert checkpoint.restore(tmp_path, shapes(small_state(0)))[0] == 2


def test_damaged_parameters_are_not_loaded(tmp_path, capsys):
  """An eval reads the sound step, and moves nothing."""
  two_steps(tmp_path)
  flip(data_file(tmp_path / '2'))
  abstract = shapes(small_state(0)).params
  assert_same(checkpoint.load_params(tmp_path, abstract), small_state(1).params)
  assert f'{tmp_path}/2 is damaged' in capsys.readouterr().out
  flip(data_file(tmp_path / '1'))
  with pytest.raises(UserError) as e:
    checkpoint.load_params(tmp_path, abstract)
  assert str(e.value).startswith(f'checkpoint {tmp_path}/1 is damaged')
  assert str(e.value).endswith('copy it again, or delete it')
  assert '\n' not in str(e.value)
  assert steps_on_disk(tmp_path) == ['1', '2']


def test_a_format_number_cannot_hide_damage(tmp_path):
  """5 and 4 differ in a bit, and 4 has no digests."""
  two_steps(tmp_path)
  path = tmp_path / '2' / 'meta' / 'metadata'
  path.write_text(path.read_text().replace('"format": 5', '"format": 4'))
  assert checkpoint.read_meta(tmp_path)['step'] == 1


def test_a_checkpoint_without_digests_is_read_and_said(tmp_path, capsys):
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 1, small_state(1))
  as_format_4(tmp_path / '1')
  checkpoint.require(tmp_path, IDENTITY, 'why')
  params = checkpoint.load_params(tmp_path, shapes(small_state(0)).params)
  assert_same(params, small_state(1).params)
  assert 'no digests' in capsys.readouterr().out


def test_digests_are_those_of_any_mesh(tmp_path):
  state = random_state(toy_run.mesh(4, 2), 3)
  alone = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), state.params)
  assert checkpoint._digests(state.params) == checkpoint._digests(alone)


def test_what_a_killed_save_left_is_removed(tmp_path):
  left = tmp_path / '2.orbax-checkpoint-tmp-7'
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 1, small_state(1))
  os.makedirs(left / 'params')
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 2, small_state(2))
  assert not left.exists()


def test_a_half_written_step_is_not_seen(tmp_path):
  """What Orbax leaves behind when the process dies before the rename."""
  with checkpoint.open_manager(tmp_path) as manager:
    save(manager, 1, small_state(1))
  os.makedirs(tmp_path / '2.orbax-checkpoint-tmp' / 'params')
  assert checkpoint.latest_step(tmp_path) == 1
  assert checkpoint.read_meta(tmp_path)['step'] == 1
  with checkpoint.open_manager(tmp_path) as manager:
    assert manager.latest_step() == 1
    save(manager, 2, small_state(2), loss=2.0)
  assert steps_on_disk(tmp_path) == ['1', '2']


KILLED = """
import os, signal, sys, time
sys.path[:0] = ['tests', 'tests/helpers']
import jax
import test_checkpoint as t
from refrag_jax import checkpoint
manager = checkpoint.open_manager(sys.argv[1])
t.save(manager, 1, t.small_state(1), 2.0)
checkpoint.save(manager, 2, t.small_state(2), t.META, 1.0)
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize('delay', [0.0, 0.02])
def test_killed_while_saving(tmp_path, delay):
  """The step is there whole, or it is not there; the one before always is."""
  done = subprocess.run(
    [sys.executable, '-c', KILLED, str(tmp_path), str(delay)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  step = checkpoint.latest_step(tmp_path)
  assert step in (1, 2)
  with checkpoint.open_manager(tmp_path) as manager:
    restored = checkpoint.restore(tmp_path, shapes(small_state(0)))[1]
    assert_same(restored, small_state(step))
    save(manager, 3, small_state(3), 3.0)
  assert checkpoint.latest_step(tmp_path) == 3


def shapes(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def test_a_file_in_place_of_the_directory_is_an_os_error(tmp_path):
  (tmp_path / 'runs').write_text('mine')
  with pytest.raises(OSError, match='runs'):
    checkpoint.open_manager(tmp_path / 'runs' / 'cpt')
  assert (tmp_path / 'runs').read_text() == 'mine'


def test_a_read_only_directory_is_an_os_error(tmp_path, read_only, monkeypatch):
  """The checkpoint of before stays as it was, and nothing is half-written."""
  # Orbax's threads wait so long for the directory that cannot be made, and
  # pytest's end waits for them; it has no option for it.
  monkeypatch.setattr(
    'orbax.checkpoint._src.multihost.multihost._DEFAULT_BARRIER_TIMEOUT', 3
  )
  with checkpoint.open_manager(tmp_path / 'disk' / 'cpt') as manager:
    save(manager, 1, small_state(1))
  read_only()
  with pytest.raises(OSError, match='Read-only|Permission'):
    with checkpoint.open_manager(tmp_path / 'disk' / 'cpt') as manager:
      save(manager, 2, small_state(2))
  assert steps_on_disk(tmp_path / 'disk' / 'cpt') == ['1']
  assert checkpoint.latest_step(tmp_path / 'disk' / 'cpt') == 1


@pytest.fixture
def read_only(tmp_path):
  """A function that makes tmp_path/disk read-only; root needs a mount."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o']
  if os.geteuid() != 0:
    yield lambda: [os.chmod(d, 0o555) for d in (disk, disk / 'cpt')]
    for directory in (disk, disk / 'cpt'):
      os.chmod(directory, 0o755)
  elif subprocess.run([*command, 'size=1m', 'none', disk]).returncode:
    pytest.skip('root may write anywhere, and cannot mount a disk here')
  else:
    yield lambda: subprocess.run(
      [*command, 'remount,ro', 'none', disk], check=True
    )
    subprocess.run(['umount', '-l', disk], check=True)


def test_a_disk_that_takes_no_more_keeps_the_checkpoint_of_before(tmp_path):
  """Writing fails half-way, as on a full disk: file sizes are limited."""
  big = small_state(2)
  big = big.replace(
    params={'decoder': {'w': jax.random.normal(jax.random.key(0), (10**6,))}}
  )
  manager = checkpoint.open_manager(tmp_path)
  save(manager, 1, small_state(1))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises((OSError, ValueError), match='File too large'):
      save(manager, 2, big)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    manager.close()
  assert steps_on_disk(tmp_path) == ['1']
  assert checkpoint.latest_step(tmp_path) == 1
  with checkpoint.open_manager(tmp_path) as manager:
    restored = checkpoint.restore(tmp_path, shapes(small_state(0)))[1]
    assert_same(restored, small_state(1))
    save(manager, 2, big)  # once there is room again
  assert checkpoint.latest_step(tmp_path) == 2
