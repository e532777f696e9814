"""Exit codes, --help without JAX, the compile cache, clusters."""

import errno
import os
import subprocess
import sys
import time
import types

import pytest
import two_processes

from configs import xla_flags
from refrag_jax import environment, main
from refrag_jax.errors import Stopped, UserError

TINY = f'--config={environment.ROOT}/configs/tiny.py'


def python(*arguments, **kwargs):
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    cwd=environment.ROOT,
    **kwargs,
  )


def test_help_is_quick_and_imports_no_jax():
  start = time.monotonic()
  done = python('-X', 'importtime', '-m', 'refrag_jax.main', '--help')
  seconds = time.monotonic() - start
  assert done.returncode == 0
  for mode in [*main.MODES, *main.LATER]:
    assert f'\n  {mode} ' in done.stdout
  imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
  assert not imported & {'jax', 'numpy', 'ml_collections', 'rich', 'grain'}
  # 0.1 s here; the bound leaves room for a busy machine.
  assert seconds < 5


def test_a_typo_exits_with_2_and_no_traceback():
  done = python('-m', 'refrag_jax.main', TINY, '--config.model.chunk_sise=8')
  assert done.returncode == 2
  assert done.stderr == (
    "refrag_jax: unknown config key 'model.chunk_sise'; did you mean "
    "'model.chunk_size'?\n"
  )


def test_an_unforeseen_error_shows_its_traceback(tmp_path):
  script = (
    'import runpy, sys, types\n'
    'm = types.ModuleType("broken")\n'
    'sys.modules["refrag_jax.doctor"] = m\n'
    'def run(config, workdir): raise RuntimeError("deep down")\n'
    'm.run = run\n'
    'sys.argv = ["main", "--mode=doctor"]\n'
    'runpy.run_module("refrag_jax.main", run_name="__main__")\n'
  )
  done = python('-c', script)
  assert done.returncode == 1
  assert 'Traceback' in done.stderr
  assert 'deep down' in done.stderr


@pytest.mark.parametrize('mode', main.LATER)
def test_modes_that_are_not_there_say_so(mode, capsys):
  assert main.main([f'--mode={mode}']) == 2
  assert 'not there yet' in capsys.readouterr().err


def test_an_unknown_mode_is_suggested(capsys):
  assert main.main(['--mode=evla', TINY]) == 2
  assert "did you mean 'eval'?" in capsys.readouterr().err


def test_no_arguments_is_a_sentence(capsys):
  assert main.main([]) == 2
  assert '--config=configs/tiny.py' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('error', 'code', 'text'),
  [
    (UserError('no text'), 2, 'refrag_jax: no text\n'),
    (
      KeyboardInterrupt(),
      1,
      'refrag_jax: interrupted; the same command continues from the last '
      'checkpoint\n',
    ),
    (Stopped('stopped at step 3'), 75, 'refrag_jax: stopped at step 3\n'),
    (
      OSError(errno.ENOSPC, 'No space left on device', 'a/b'),
      1,
      'refrag_jax: cannot write or read a/b: No space left on device\n',
    ),
    (
      OSError(errno.EROFS, 'Read-only file system', 'a/b'),
      1,
      'refrag_jax: cannot write or read a/b: Read-only file system\n',
    ),
  ],
)
def test_exit_codes(error, code, text, monkeypatch, capsys):
  def run(argv):
    raise error

  monkeypatch.setattr(main, '_dispatch', run)
  assert main.main([]) == code
  assert capsys.readouterr().err == text


SIGTERMED = """
import os, signal, sys, time
from refrag_jax import main

class Doctor:
  def run(config, workdir):
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(60)
    except Exception as e:  # as around the reading of a file
      raise ValueError from e

main.importlib.import_module = lambda _: Doctor
sys.exit(main.main(['--mode=doctor']))
"""


def test_sigterm_asks_for_another_run_whatever_is_done():
  """Where nothing is saved at the next step, as text is prepared."""
  done = python('-c', SIGTERMED)
  assert done.returncode == 75, done.stderr
  assert done.stderr == (
    'refrag_jax: SIGTERM: stopped; the same command starts this again\n'
  )


def test_other_errors_are_not_swallowed(monkeypatch):
  def run(argv):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(main, '_dispatch', run)
  with pytest.raises(OSError, match='Input'):
    main.main([])


def test_dispatch_hands_over_config_and_workdir(tmp_path, monkeypatch):
  seen = []

  class Module:
    @staticmethod
    def run(config, workdir):
      seen.append((config.name, workdir))

  monkeypatch.chdir(tmp_path)
  for name in ('JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME'):
    monkeypatch.setenv(name, str(tmp_path / 'cache'))
  monkeypatch.setattr(main.importlib, 'import_module', lambda name: Module)
  assert main.main([TINY]) == 0
  assert main.main([TINY, '--mode=eval', '--workdir=there']) == 0
  assert seen == [('tiny', 'runs/tiny'), ('tiny', 'there')]
  assert (tmp_path / 'runs' / 'tiny' / 'config.json').exists()
  assert (tmp_path / 'there' / 'config_eval.json').exists()


def test_the_compile_cache_is_set_but_not_overruled():
  environ = {'XDG_CACHE_HOME': '/cache'}
  assert environment.set_compilation_cache(environ) == '/cache/refrag_jax/xla'
  assert environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] == '0'
  assert environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] == '-1'
  environ = {'JAX_COMPILATION_CACHE_DIR': '/mine'}
  assert environment.set_compilation_cache(environ) == '/mine'


SLURM = {
  'SLURM_JOB_ID': '1',
  'SLURM_STEP_NODELIST': 'a,b',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
OURS = {
  'JAX_COORDINATOR_ADDRESS': 'a:1',
  'REFRAG_NUM_PROCESSES': '2',
  'REFRAG_PROCESS_ID': '1',
}


@pytest.mark.parametrize(
  ('environ', 'hardware', 'expected'),
  [
    ({}, 'cpu', None),
    ({}, 'nvidia', None),  # one host with several cards needs nothing
    ({}, 'tpu', {}),
    ({'JAX_PLATFORMS': 'cpu'}, 'tpu', None),
    (SLURM, 'nvidia', {}),
    (SLURM | {'SLURM_NTASKS': '1'}, 'nvidia', None),
    ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '2'}, 'nvidia', None),  # sbatch
    (
      {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': 'x'},
      'nvidia',
      {},
    ),
    (
      {'OMPI_COMM_WORLD_SIZE': '2'},
      'nvidia',
      {'cluster_detection_method': 'mpi4py'},
    ),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, 'nvidia', None),
    (
      OURS,
      'nvidia',
      {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 1},
    ),
  ],
)
def test_clusters_are_recognised(environ, hardware, expected):
  assert environment.cluster(environ, hardware) == expected


@pytest.mark.parametrize('lacking', OURS)
def test_half_a_cluster_is_refused(lacking):
  environ = {name: value for name, value in OURS.items() if name != lacking}
  with pytest.raises(UserError, match='REFRAG_NUM_PROCESSES'):
    environment.cluster(environ, 'cpu')


def test_a_wrong_process_number_is_refused():
  with pytest.raises(UserError, match='numbered from 0'):
    environment.cluster(OURS | {'REFRAG_PROCESS_ID': '2'}, 'cpu')


def test_an_accelerator_without_its_jax_is_refused(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(environment, 'accelerator', lambda: 'nvidia')
  monkeypatch.setattr(environment, 'versions', lambda: {'jax': '0.10.2'})
  with pytest.raises(UserError, match=r'jax\[cuda12\]==0.10.2'):
    environment.join_cluster(60, 30)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert environment.join_cluster(60, 30)


def test_flags_go_to_the_hardware_they_are_for():
  environ = {'XLA_FLAGS': '--mine=1'}
  flags = ('--a=1', '--b=2'), ('--t=3',)
  environment.set_flags(environ, 'cpu', *flags)
  assert environ == {'XLA_FLAGS': '--mine=1'}
  environment.set_flags(environ, 'tpu', *flags)
  assert environ == {'XLA_FLAGS': '--mine=1', 'LIBTPU_INIT_ARGS': '--t=3'}
  environment.set_flags(environ, 'nvidia', *flags)
  assert environ['XLA_FLAGS'] == '--a=1 --b=2 --mine=1'  # the last one wins


def test_this_jaxlib_knows_the_flags():
  """An unknown flag ends the program at its first use of XLA."""
  run = lambda flags: (
    subprocess.run(
      [sys.executable, '-c', 'import jax; jax.devices()'],
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      capture_output=True,
    ).returncode
  )
  assert run(' '.join(xla_flags.H100)) == 0
  assert run('--xla_gpu_no_such_flag=true') != 0


@pytest.mark.parametrize(('mode', 'joins'), [('train', 1), ('plan', 0)])
def test_who_waits_for_the_other_processes(mode, joins, monkeypatch, tmp_path):
  """On one host of a TPU pod a plan would wait for the others in vain."""
  called, stub = [], types.ModuleType('stub')
  stub.run = lambda *_: 0
  monkeypatch.setitem(sys.modules, 'stub', stub)
  monkeypatch.setitem(main.MODES, mode, ('stub', 'run', ''))
  monkeypatch.setattr(
    environment, 'join_cluster', lambda *args: called.append(args) or True
  )
  assert main.main([TINY, f'--mode={mode}', f'--workdir={tmp_path}']) == 0
  assert len(called) == joins


def test_two_processes_find_each_other(tmp_path):
  """The real thing: two processes on this machine, as a cluster would."""
  script = (
    'from refrag_jax import environment\n'
    'first = environment.join_cluster(60, 30)\n'
    'import jax\n'
    'print(first, jax.process_index(), jax.process_count())\n'
  )
  lines = two_processes.last_lines(script)
  assert lines == ['True 0 2', 'False 1 2']


def test_a_process_that_waits_in_vain_says_so():
  done = subprocess.run(
    [sys.executable, '-c', 'from refrag_jax import environment as e\n'
     'e.join_cluster(2, 30)'],
    env=os.environ | OURS | {
      'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1', 'JAX_PLATFORMS': 'cpu',
    },
    cwd=environment.ROOT, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == (
    'refrag_jax: not all processes came up within 2 s (REFRAG_NUM_PROCESSES): '
    'see the logs of the others, or set --config.cluster.join_seconds'
  )
