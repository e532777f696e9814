"""Several processes train as one does, and none waits for a dead one; minutes."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_config
import two_processes

from refrag_jax.evals import EVALS
from refrag_jax.runtime.environment import ROOT

pytestmark = pytest.mark.slow
STAGES = ('lm', 'reconstruct', 'cpt')
SECONDS = 60  # in which the others end when one has died


class Processes:
  """Starts the toy run in some processes of some devices each."""

  def __init__(self, tmp_path_factory):
    self.folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
    self.cache = tmp_path_factory.mktemp('xla')

  def start(self, workdir, processes, devices, *arguments):
    address = f'127.0.0.1:{two_processes.free_port()}'
    env = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(self.cache),
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    }
    started = []
    for rank in range(processes):
      if processes > 1:
        env |= {
          'JAX_COORDINATOR_ADDRESS': address,
          'REFRAG_NUM_PROCESSES': str(processes),
          'REFRAG_PROCESS_ID': str(rank),
        }
      log = open(f'{workdir}.{rank}.log', 'a')  # noqa: SIM115
      started.append(
        subprocess.Popen(
          [
            *(sys.executable, '-m', 'refrag_jax.main'),
            f'--config={ROOT}/tests/helpers/toy_config.py:{self.folder}',
            f'--workdir={workdir}',
            '--config.stages=' + ','.join(STAGES),
            '--config.evals=log_perplexity',
            '--config.eval.output_lengths=2,6',
            '--config.eval.num_windows=16',
            *arguments,
          ],
          cwd=ROOT,
          env=env,
          stdout=log,
          stderr=log,
        )
      )
    return started

  def run(self, workdir, processes, devices, *arguments):
    codes = [
      p.wait(timeout=1200)
      for p in self.start(workdir, processes, devices, *arguments)
    ]
    log = pathlib.Path(f'{workdir}.0.log').read_text()
    assert codes == [0] * processes, log[-3000:]
    return numbers(workdir)


def numbers(workdir):
  with open(os.path.join(workdir, 'results.json')) as f:
    return json.load(f)


def means(tree, path=()):
  """Path: value of each mean in a results.json."""
  out = {}
  for key, value in tree.items() if isinstance(tree, dict) else ():
    if key == 'mean':
      out[path] = value
    else:
      out |= means(value, (*path, key))
  for i, value in enumerate(tree if isinstance(tree, list) else ()):
    out |= means(value, (*path, i))
  return out


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
  return Processes(tmp_path_factory)


@pytest.fixture(scope='module')
def one(processes, tmp_path_factory):
  """What one process with four devices makes of it."""
  return processes.run(tmp_path_factory.mktemp('one') / 'run', 1, 4)


@pytest.fixture(scope='module')
def two(processes, tmp_path_factory):
  """The workdir of two processes that nobody disturbed."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  processes.run(workdir, 2, 2)
  return workdir


def assert_close(a, b):
  a, b = means(a), means(b)
  assert a.keys() == b.keys() and len(a) > 30
  for path in a:
    np.testing.assert_allclose(a[path], b[path], rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_losses_of_one(one, two):
  assert_close(one, numbers(two))
  with open(f'{two}.1.log') as f:
    said = f.read()
  assert 'process 1 of 2, found by REFRAG_NUM_PROCESSES' in said
  assert 'loss' not in said  # the first one speaks


def test_four_processes_give_the_losses_of_one(processes, one, tmp_path):
  assert_close(one, processes.run(tmp_path / 'run', 4, 1))


def test_an_inner_axis_may_lie_across_processes(processes, tmp_path):
  """Then both read the same rows, and each holds half of the heads."""
  mesh = '--config.mesh.data=1', '--config.mesh.tensor=2'
  alone = processes.run(tmp_path / 'alone', 1, 2, *mesh)
  assert_close(alone, processes.run(tmp_path / 'run', 2, 1, *mesh))


def started(processes, workdir):
  """Two processes that have finished a stage."""
  both = processes.start(workdir, 2, 2)
  deadline = time.monotonic() + 600
  while not (workdir / 'stages' / 'lm.json').exists():
    assert time.monotonic() < deadline and both[0].poll() is None
    time.sleep(0.05)
  return both


def test_a_signal_to_one_stops_both_at_the_same_step(processes, two, tmp_path):
  first, second = started(processes, tmp_path / 'run')
  second.terminate()
  assert [p.wait(timeout=300) for p in (first, second)] == [75, 75]
  again = processes.run(tmp_path / 'run', 2, 2)
  assert means(again) == means(numbers(two))  # bit for bit


def test_every_eval_over_two_processes_that_share_out_the_parameters(
  processes, tmp_path
):
  """No process holds a whole matrix; the numbers are those of one process."""
  arguments = (
    '--config.stages=lm,reconstruct,cpt,mixed,grpo,sft,cpt_trained,'
    'mixed_trained,sft_full,sft_none',
    f'--config.evals={",".join(EVALS)}',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=-1',
  )
  alone = processes.run(tmp_path / 'alone', 1, 2, *arguments)
  both = processes.run(tmp_path / 'both', 2, 1, *arguments)
  assert set(both['evals']) == set(EVALS)
  assert all(both['evals'].values()) and both['left_out'] == []
  assert_close(alone['evals'], both['evals'])


EVERY = '--config.stages=lm,reconstruct,cpt,mixed,grpo'


def signalled_from(workdir):
  """Waits until a run that was just started honours signals."""
  log, deadline = pathlib.Path(f'{workdir}.0.log'), time.monotonic() + 300
  while ' x cpu; ' not in log.read_text():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  time.sleep(0.2)


@pytest.fixture(scope='module')
def undisturbed(processes, tmp_path_factory):
  """The numbers of a run of one process, and the seconds that it took."""
  folder = tmp_path_factory.mktemp('undisturbed')
  for name in ('cold', 'warm'):
    (run,) = processes.start(folder / name, 1, 1, EVERY)
    signalled_from(folder / name)
    start = time.monotonic()
    assert run.wait(timeout=1200) == 0
  return numbers(folder / name), time.monotonic() - start


@pytest.mark.parametrize('trial', range(20))
def test_a_signal_at_any_time(processes, undisturbed, tmp_path, trial):
  """In compilation, training, rollouts, measures, saves and evals."""
  want, seconds = undisturbed
  workdir = tmp_path / 'run'
  (run,) = processes.start(workdir, 1, 1, EVERY)
  signalled_from(workdir)
  # One in each twentieth of the run.
  time.sleep(
    seconds * np.random.default_rng(trial).uniform(trial, trial + 1) / 20
  )
  run.terminate()
  code = run.wait(timeout=300)
  if not (workdir / 'results.json').exists():  # else it was done by then
    assert code == 75
    said = pathlib.Path(f'{workdir}.0.log').read_text()
    assert 'run the same command' in said or 'starts them again' in said
  assert means(processes.run(workdir, 1, 1, EVERY)) == means(want)


def test_killed_twenty_times(processes, undisturbed, tmp_path):
  """At random, resumed each time: two steps a stage on disk, and its end."""
  want, seconds = undisturbed
  workdir = tmp_path / 'run'
  often = '--config.checkpoint_every_steps=1'
  rng = np.random.default_rng(0)
  for _ in range(20):
    (run,) = processes.start(workdir, 1, 1, EVERY, often)
    signalled_from(workdir)
    # Each goes on from the one before: all together come to about the whole.
    time.sleep(seconds * rng.uniform(0, 0.1))
    assert run.poll() is None, 'it was done before the last kill'
    run.kill()
    run.wait()
    pathlib.Path(f'{workdir}.0.log').unlink()
    assert max(steps_on_disk(workdir), default=0) <= 2
  assert means(processes.run(workdir, 1, 1, EVERY, often)) == means(want)
  assert max(steps_on_disk(workdir)) <= 2
  left = [path for path in workdir.rglob('*tmp*') if path.is_dir()]
  assert not left


def steps_on_disk(workdir) -> list[int]:
  """How many steps each stage has."""
  return [
    sum(step.name.isdigit() for step in stage.iterdir())
    for stage in (workdir / 'checkpoints').glob('*')
  ]


def test_when_one_dies_the_other_ends(processes, two, tmp_path):
  first, second = started(processes, tmp_path / 'run')
  second.kill()
  died = time.monotonic()
  assert first.wait(timeout=2 * SECONDS) not in (0, None)
  assert time.monotonic() - died < SECONDS
  again = processes.run(tmp_path / 'run', 2, 2)
  assert means(again) == means(numbers(two))
