"""Exit codes, --help without JAX, the compile cache, clusters."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
import two_processes

from configs import xla_flags
from refrag_jax import main
from refrag_jax.errors import Stopped, UserError
from refrag_jax.runtime import environment, stopping

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


SIGNALLED = """
import os, signal, sys, time
from refrag_jax import main

class Doctor:
  def run(config, workdir):
    try:
      os.kill(os.getpid(), getattr(signal, sys.argv[1]))
      time.sleep(60)
    except Exception as e:  # as around the reading of a file
      raise ValueError from e

main.importlib.import_module = lambda _: Doctor
sys.exit(main.main(['--mode=doctor']))
"""


@pytest.mark.parametrize('name', [s.name for s in stopping.SIGNALS])
def test_a_signal_asks_for_another_run_whatever_is_done(name):
  """Where nothing is saved at the next step, as text is prepared."""
  done = python('-c', SIGNALLED, name)
  assert done.returncode == 75, done.stderr
  assert done.stderr == (
    f'refrag_jax: {name}: stopped; the same command starts this again\n'
  )


def test_a_stop_that_a_library_swallowed_is_not_forgotten():
  """What JAX runs in Python's garbage collection may not raise, such as this."""
  with main._stopping():
    with contextlib.suppress(Stopped):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(5)
    with stopping.stop_on_signal() as stop:
      assert stop.is_set()
  assert main.main(['--help']) == 0  # another run begins anew
  with stopping.stop_on_signal() as stop:
    assert not stop.is_set()


def test_a_signal_while_the_config_is_read(monkeypatch, capsys):
  def load(command):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(5)

  monkeypatch.setattr(main.cli, 'load', load)
  assert main.main([TINY]) == 75
  assert 'SIGUSR1: stopped' in capsys.readouterr().err
  with stopping.stop_on_signal() as stop:  # of a run that begins after it
    assert not stop.is_set()


def test_other_errors_are_not_swallowed(monkeypatch):
  def run(argv):
    raise OSError(errno.ECHILD, 'No child processes')

  monkeypatch.setattr(main, '_dispatch', run)
  with pytest.raises(OSError, match='child'):
    main.main([])


@pytest.mark.parametrize(
  'name',
  [
    'EACCES', 'EBUSY', 'EDQUOT', 'EFBIG', 'EIO', 'EISDIR', 'ELOOP', 'EMFILE',
    'ENAMETOOLONG', 'ENFILE', 'ENODEV', 'ENOLCK', 'ENOSPC', 'ENOTCONN',
    'ENOTDIR', 'ENXIO', 'EPERM', 'EROFS', 'ESTALE', 'ETIMEDOUT',
  ],
)  # fmt: skip
def test_what_the_machine_does_is_one_line(name, monkeypatch, capsys):
  number = getattr(errno, name)
  plain = OSError(number, os.strerror(number), '/a/b')
  passed_on = ValueError('could not save')
  passed_on.__cause__ = plain
  in_text = ValueError(  # of TensorStore
    'OUT_OF_RANGE: Error writing "1/mu/0.0" in OCDBT database at local file '
    '"/w/lm/2/": Failed writing: "/a/b": Failed to write 19518 bytes to file '
    f"30: {os.strerror(number)} [os_error_code='{number}']"
  )
  for error in (plain, passed_on, in_text):
    monkeypatch.setattr(main, '_dispatch', lambda argv, e=error: _raise(e))
    assert main.main([]) == 1
    line = f'refrag_jax: cannot write or read /a/b: {os.strerror(number)}'
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count('\n') == 1


def _raise(error):
  raise error


FILLED = """
import resource, sys
from refrag_jax import main

class Doctor:
  def run(config, workdir):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with open(sys.argv[1], 'wb') as file:
      file.write(bytes(2000))

main.importlib.import_module = lambda _: Doctor
sys.exit(main.main(['--mode=doctor']))
"""


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
  done = python('-c', FILLED, str(tmp_path / 'f'))
  assert done.returncode == 1
  assert done.stderr == (
    'refrag_jax: cannot write or read a file: File too large; raise the limit '
    "of a file's size (ulimit -f)\n"
  )


PRINTS = """
import sys
from refrag_jax import main

class Doctor:
  def run(config, workdir):
    print('runs/\xfc', chr(0xdcff))
    print('\u2264', file=sys.stderr)

main.importlib.import_module = lambda _: Doctor
sys.exit(main.main(['--mode=doctor']))
"""


@pytest.mark.parametrize(
  ('encoding', 'out', 'err'),
  [('ascii', 'runs/? ?\n', '?\n'), ('utf-8', 'runs/\xfc ?\n', '\u2264\n')],
)
def test_a_terminal_without_unicode_shows_what_it_can(encoding, out, err):
  environ = os.environ | {'PYTHONIOENCODING': encoding}
  done = python('-c', PRINTS, env=environ, encoding='utf-8')
  assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


def test_the_config_table_needs_no_unicode(tmp_path):
  script = (
    'import sys, types\n'
    'sys.modules["stub"] = types.SimpleNamespace(run=lambda *_: 0)\n'
    'from refrag_jax import main\n'
    'main.MODES["data"] = ("stub", "run", "")\n'
    'sys.exit(main.main(sys.argv[1:]))\n'
  )
  done = python(
    '-c', script, TINY, '--mode=data', f'--workdir={tmp_path}/\xfc',
    '--config.data.text=\xfc.txt',
    env=os.environ | {'PYTHONIOENCODING': 'ascii'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'command line  (?.txt)' in done.stdout
  assert (tmp_path / '\xfc' / 'config_data.json').exists()


def test_no_stdout_is_no_error(monkeypatch):
  monkeypatch.setattr(sys, 'stdout', None)  # as after `>&-`
  assert main.main(['--help']) == 0


def test_bytes_that_are_no_text_are_refused(capsys):
  name = os.fsdecode(b'runs/\xff')
  assert main.main([TINY, f'--workdir={name}']) == 2
  assert 'runs/? is not in UTF-8' in capsys.readouterr().err


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
    (SLURM, 'nvidia', {'num_processes': 2}),
    (SLURM | {'SLURM_NTASKS': '1'}, 'nvidia', None),
    # A step has tasks of its own, not always as many as its allocation.
    (SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, 'nvidia', None),
    (
      SLURM | {'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_TASKS': '4'},
      'nvidia',
      {'num_processes': 4},
    ),
    (SLURM | {'SLURM_STEP_NUM_TASKS': ''}, 'nvidia', {'num_processes': 2}),
    (dict.fromkeys(SLURM, ''), 'nvidia', None),
    # mpirun in an interactive step, or over the daemons that it starts by srun
    (
      SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'OMPI_COMM_WORLD_SIZE': '4'},
      'nvidia',
      {'cluster_detection_method': 'mpi4py'},
    ),
    ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '2'}, 'nvidia', None),  # sbatch
    (
      {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': 'x'},
      'nvidia',
      {'cluster_detection_method': 'ompi'},
    ),
    (
      {'OMPI_COMM_WORLD_SIZE': '2'},
      'nvidia',
      {'cluster_detection_method': 'mpi4py'},
    ),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, 'nvidia', None),
    ({'OMPI_COMM_WORLD_SIZE': ''}, 'nvidia', None),
    (dict.fromkeys(OURS, ''), 'nvidia', None),
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


@pytest.mark.parametrize(
  ('environ', 'said'),
  [
    ({'OMPI_COMM_WORLD_SIZE': 'x'}, 'OMPI_COMM_WORLD_SIZE=x is not a number'),
    (SLURM | {'SLURM_NTASKS': 'x'}, 'SLURM_NTASKS=x is not a number'),
    (SLURM | {'SLURM_PROCID': '-1'}, 'SLURM_PROCID=-1 is not a number'),
    (OURS | {'JAX_COORDINATOR_ADDRESS': 'a'}, 'it is written HOST:PORT'),
  ],
)
def test_a_cluster_in_other_words_is_refused(environ, said):
  with pytest.raises(UserError, match=said):
    environment.cluster(environ, 'cpu')


@pytest.mark.parametrize(
  ('environ', 'hardware', 'left'),
  [
    ({}, 'cpu', {'JAX_PLATFORMS': 'cpu'}),
    ({'JAX_PLATFORMS': ''}, 'cpu', {'JAX_PLATFORMS': 'cpu'}),
    ({'JAX_PLATFORMS': 'cuda'}, 'cpu', {'JAX_PLATFORMS': 'cuda'}),
    ({}, 'nvidia', {}),
    ({}, 'tpu', {}),
    ({'JAX_ENABLE_X64': '', 'XLA_FLAGS': ' ', 'A': ''}, 'tpu', {'A': ''}),
  ],
)
def test_jax_is_told_where_there_is_no_accelerator(
  environ, hardware, left, monkeypatch
):
  monkeypatch.setattr(environment, '_OTHER_DEVICES', ())
  environment.set_platform(environ, hardware)
  assert environ == left


def test_jax_looks_for_itself_at_devices_that_we_do_not_know(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(environment, '_OTHER_DEVICES', (f'{tmp_path}*',))
  environ = {}
  environment.set_platform(environ, 'cpu')
  assert environ == {}


@pytest.mark.parametrize('platform', ['cuda', 'gpu', 'tpu', 'rocm', 'cuda,tpu'])
def test_a_platform_that_is_not_there_is_a_sentence(
  platform, monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(environment, '_OTHER_DEVICES', ())
  monkeypatch.setattr(environment, 'accelerator', lambda: 'cpu')
  monkeypatch.setenv('JAX_PLATFORMS', platform)
  assert main.main([TINY, f'--workdir={tmp_path}/w']) == 2
  assert capsys.readouterr().err == (
    f'refrag_jax: JAX_PLATFORMS={platform}, but there is no such device here '
    '(unset it, or =cpu)\n'
  )
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  'error', [AssertionError(), RuntimeError('Unable to initialize backend')]
)
def test_a_device_that_does_not_start_is_a_sentence(error, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setattr(environment, 'accelerator', lambda: 'nvidia')
  monkeypatch.setattr(environment, 'versions', lambda: {'jax': '0.10.2'})
  monkeypatch.setattr(jax, 'devices', lambda: _raise(error))
  with pytest.raises(UserError) as caught:
    environment.start_jax()
  said = str(caught.value)
  assert 'JAX_PLATFORMS=cuda' in said and 'jax[cuda12]==0.10.2' in said


@pytest.mark.parametrize(
  ('name', 'value'), [('JAX_ENABLE_X64', 'maybe'), ('JAX_NUM_CPU_DEVICES', 'x')]
)
def test_a_value_that_jax_does_not_take_is_a_sentence(name, value):
  done = python(
    '-c',
    'from refrag_jax import errors; from refrag_jax.runtime import environment as e\n'
    'try: e.start_jax()\n'
    'except errors.UserError as error: print(error)\n',
    env=os.environ | {name: value},
  )
  assert done.stdout.startswith(f'{name}={value} is no value that JAX takes')


def test_the_plugins_stay_out_of_a_run_on_the_cpu(tmp_path):
  """Of NVIDIA's each part says at its import that there is no driver."""
  for name in ('jax_plugins/xla_cuda12', 'jax_cuda12_plugin'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / '__init__.py').write_text(f'print("loaded {name}")\n')
  environ = os.environ | {'PYTHONPATH': str(tmp_path), 'JAX_PLATFORMS': 'cpu'}
  start = 'from refrag_jax.runtime import environment as e; e.start_jax()'
  done = python('-c', start, env=environ)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
  done = python('-c', 'import jax; jax.devices()', env=environ)
  assert 'loaded' in done.stdout  # without ours they are


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
  environment.set_flags(environ, 'tpu', *flags)
  assert environ == {'XLA_FLAGS': '--mine=1', 'LIBTPU_INIT_ARGS': '--t=3'}
  environment.set_flags(environ, 'nvidia', *flags)
  assert environ['XLA_FLAGS'] == '--a=1 --b=2 --mine=1'  # the last one wins
  environ = {'XLA_FLAGS': '--mine=1'}
  environment.set_flags(environ, 'cpu', *flags)
  jaxlib = environment.versions()['jaxlib']
  assert environ['XLA_FLAGS'].split() == [
    *environment.cpu_flags(jaxlib), '--mine=1',
  ]  # fmt: skip


def test_this_jaxlib_knows_the_flags():
  """An unknown flag ends the program at its first use of XLA."""
  assert environment.bad_flags(' '.join(xla_flags.H100)) == ''
  assert environment.bad_flags('') == ''
  own = environment.cpu_flags(environment.versions()['jaxlib'])
  tried = [*own, '--xla_force_host_platform_device_count=1']
  assert environment.bad_flags(' '.join(tried)) == ''
  # The one that 0.11 would end the program for.
  assert environment.cpu_flags('0.10.2') and not environment.cpu_flags('0.11.2')


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    ('--xla_bogus=1', 'this jaxlib does not know --xla_bogus'),
    ('--xla_a=1 --xla_b', 'this jaxlib does not know --xla_a --xla_b'),
    (
      '--xla_cpu_enable_fast_math=maybe',
      "'maybe' is no value of --xla_cpu_enable_fast_math",
    ),
    ('xla_bogus', "'xla_bogus' is neither a flag, which begins with --, nor a "
                  'file of flags'),
  ],
)  # fmt: skip
def test_wrong_flags_are_told_before_they_end_the_program(flags, said):
  assert environment.bad_flags(flags) == f'XLA_FLAGS: {said}'


def test_wrong_flags_are_one_line(tmp_path):
  done = python(
    '-m', 'refrag_jax.main', TINY, f'--workdir={tmp_path}/w',
    env=os.environ | {'XLA_FLAGS': '--xla_bogus=1'},
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr == (
    'refrag_jax: XLA_FLAGS: this jaxlib does not know --xla_bogus\n'
  )


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
    'from refrag_jax.runtime import environment\n'
    'first = environment.join_cluster(60, 30)\n'
    'import jax\n'
    'print(first, jax.process_index(), jax.process_count())\n'
  )
  lines = two_processes.last_lines(script)
  assert lines == ['True 0 2', 'False 1 2']


def test_a_process_that_waits_in_vain_says_so():
  done = subprocess.run(
    [sys.executable, '-c', 'from refrag_jax.runtime import environment as e\n'
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
