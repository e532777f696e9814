"""What this process runs in: versions, accelerator, cluster, compile cache.

No JAX and nothing outside the standard library: `main` asks before JAX is
imported, and `launch/setup.sh` before anything is installed:

  python -m refrag_jax.runtime.environment     # prints nvidia, tpu or cpu
"""

import contextlib
import functools
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

from refrag_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a result depends on, in the order in which it is printed.
PACKAGES = (
  'jax',
  'jaxlib',
  'jax-cuda12-plugin',
  'jax-cuda13-plugin',
  'libtpu',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'tensorflow-datasets',
  'importlib_resources',
  'ml_collections',
  'transformers',
  'tokenizers',
  'safetensors',
  'numpy',
)
# PCI device numbers of TPU v2/v3 to v7x, as in jax/_src/hardware_utils.py; the
# vendor alone does not do, Google's network cards have it too.
_GOOGLE = '0x1ae0'
_TPU_DEVICES = (
  '0x0027',
  '0x0056',
  '0x005e',
  '0x0062',
  '0x0063',
  '0x006f',
  '0x0076',
)
# What JAX can run on, besides the CPU, by the names of JAX_PLATFORMS.
_ACCELERATORS = ('cuda', 'gpu', 'rocm', 'tpu')
# Devices that `accelerator` does not know: AMD's, a GPU through WSL, TPUs in
# containers that hide the PCI bus.
_OTHER_DEVICES = (
  '/dev/kfd',
  '/dev/dxg',
  '/dev/nvidia*',
  '/dev/nvmap',
  '/dev/accel[0-9]*',
  '/dev/vfio/[0-9]*',
)
_PARSE_FLAGS = 'from jaxlib import _jax; _jax.CompileOptions()'
# What jaxlib says of XLA_FLAGS before it aborts, and the sentence for it.
_BAD_FLAGS = (
  (
    r'Unknown flags? in XLA_FLAGS: (.*)',
    lambda found: (
      'XLA_FLAGS: this jaxlib does not know '
      + ' '.join(flag.partition('=')[0] for flag in found[1].split())
    ),
  ),
  (
    r"Couldn't interpret value (.*) for flag (\w+)",
    lambda found: f'XLA_FLAGS: {found[1]!r} is no value of --{found[2]}',
  ),
  (
    r'Could not open file "(.*?)" to read flags',
    lambda found: (
      f'XLA_FLAGS: {found[1]!r} is neither a flag, which begins with --, nor '
      'a file of flags'
    ),
  ),
)


def versions() -> dict[str, str]:
  """Installed versions of what a result depends on, Python's included."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


@functools.cache
def git_commit() -> str:
  """This checkout's commit, '+' behind it if files differ; '' outside one."""
  if not (ROOT / '.git').exists():
    return ''
  run = functools.partial(
    subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=10
  )
  try:
    head = run(['git', 'rev-parse', '--short=12', 'HEAD'])
    changed = run(['git', 'status', '--porcelain', '--untracked-files=no'])
  except (OSError, subprocess.TimeoutExpired):
    return ''
  if head.returncode != 0:
    return ''
  return head.stdout.strip() + ('+' if changed.stdout.strip() else '')


def accelerator() -> str:
  """The accelerator in this machine, whether JAX can use it or not."""
  if glob.glob('/dev/nvidia[0-9]*') or os.path.exists('/proc/driver/nvidia'):
    return 'nvidia'
  for vendor in glob.glob('/sys/bus/pci/devices/*/vendor'):
    device = pathlib.Path(vendor).with_name('device')
    try:
      if vendor_is_tpu(pathlib.Path(vendor).read_text(), device.read_text()):
        return 'tpu'
    except OSError:
      continue
  return 'cpu'


def vendor_is_tpu(vendor: str, device: str) -> bool:
  """Whether a PCI vendor and device number are a TPU's."""
  return vendor.strip() == _GOOGLE and device.strip() in _TPU_DEVICES


def jax_build(hardware: str, installed: Mapping[str, str]) -> str:
  """The pip requirement that this hardware needs and lacks, or ''."""
  needed = {
    'nvidia': ('cuda12', ('jax-cuda12-plugin', 'jax-cuda13-plugin')),
    'tpu': ('tpu', ('libtpu',)),
  }.get(hardware)
  if needed is None or any(name in installed for name in needed[1]):
    return ''
  return f'jax[{needed[0]}]=={installed.get("jax", "0.10.2")}'


def cache_dir(environ: Mapping[str, str], kind: str) -> str:
  """Where this project keeps what it can make anew, of one kind."""
  home = os.path.expanduser(environ.get('XDG_CACHE_HOME') or '~/.cache')
  return os.path.join(home, 'refrag_jax', kind)


def set_compilation_cache(environ: dict[str, str]) -> str:
  """Makes JAX keep its compiled programs, so that a second start is quick.

  Through environment variables, which JAX reads at its import: so `main` can
  do it for every mode without importing JAX itself.

  Args:
    environ: `os.environ`; what it already sets is left alone.

  Returns:
    The cache's directory.
  """
  environ.setdefault('JAX_COMPILATION_CACHE_DIR', cache_dir(environ, 'xla'))
  # JAX's defaults leave out what compiled in under a second, most of a run of
  # a small model.
  environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  return environ['JAX_COMPILATION_CACHE_DIR']


def cpu_flags(jaxlib: str) -> tuple[str, ...]:
  """XLA's flags for a machine without accelerators, by jaxlib's version.

  0.10's fusions through MLIR take a quarter longer to compile than those that
  it had before, and are no faster: docs/results.md has command and figures.
  0.11 knows no such flag.
  """
  known = jaxlib.startswith('0.10.')
  return ('--xla_cpu_use_fusion_emitters=false',) if known else ()


def set_flags(
  environ: dict[str, str],
  hardware: str,
  xla_flags: Sequence[str],
  libtpu_flags: Sequence[str],
) -> None:
  """Hands XLA the flags for this hardware; those already there come last.

  Args:
    environ: `os.environ`, which JAX reads at its import.
    hardware: `accelerator()`.
  """
  name, flags = {
    'nvidia': ('XLA_FLAGS', xla_flags),
    'tpu': ('LIBTPU_INIT_ARGS', libtpu_flags),
    'cpu': ('XLA_FLAGS', cpu_flags(versions().get('jaxlib', ''))),
  }[hardware]
  if flags:
    environ[name] = ' '.join([*flags, environ.get(name, '')]).strip()


@functools.cache
def bad_flags(flags: str) -> str:
  """What is wrong with the text of XLA_FLAGS, as a sentence; '' if nothing is.

  jaxlib ends the process that has such flags, so another one tries them, which
  takes a while: not for those alone that `set_flags` gives every CPU.
  """
  if {*flags.split()} <= {*cpu_flags(versions().get('jaxlib', ''))}:
    return ''
  done = subprocess.run(
    [sys.executable, '-c', _PARSE_FLAGS],
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    errors='replace',
  )
  for pattern, sentence in _BAD_FLAGS:
    found = re.search(pattern, done.stderr)
    if done.returncode and found:
      return sentence(found)
  return ''


def set_platform(environ: dict[str, str], hardware: str) -> None:
  """Tells JAX of a machine without accelerators, before it looks for one.

  Else it loads every plug-in that is installed, the planner's compilers too,
  and each complains at length. Variables that are empty are left out: JAX
  takes some of them for wrong values.

  Args:
    environ: `os.environ`, which JAX reads at its import.
    hardware: `accelerator()`.
  """
  for name in list(environ):
    if name.startswith(('JAX_', 'XLA_')) and not environ[name].strip():
      del environ[name]
  if _nothing_else(hardware):
    environ.setdefault('JAX_PLATFORMS', 'cpu')


def _nothing_else(hardware: str) -> bool:
  """Whether there is surely nothing but the CPU."""
  return hardware == 'cpu' and not any(map(glob.glob, _OTHER_DEVICES))


def start_jax() -> None:
  """Imports JAX and has it find its devices.

  Raises:
    UserError: a variable asks for a device, or has a value, that there is not.
  """
  asked, hardware = os.environ.get('JAX_PLATFORMS', ''), accelerator()
  if _nothing_else(hardware) and {*asked.split(',')} <= {*_ACCELERATORS}:
    # Not left to JAX, which would try the plug-ins.
    raise UserError(
      f'JAX_PLATFORMS={asked}, but there is no such device here (unset it, or '
      '=cpu)'
    )
  jax = _import_jax()
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as e:
    reason = ' '.join(str(e).split()) or 'no such device was found'
    for name in ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME'):
      if os.environ.get(name):
        reason = f'{reason} ({name}={os.environ[name]})'
    lacks = jax_build(hardware, versions())
    advice = f'; pip install "{lacks}"' if lacks else ''
    raise UserError(f'JAX does not start: {reason}{advice}') from None


def _import_jax() -> Any:
  """JAX, without the plug-ins for cards where it was told to do without."""
  if os.environ.get('JAX_PLATFORMS') == 'cpu' and 'jax' not in sys.modules:
    for version in (12, 13):
      sys.modules[f'jax_cuda{version}_plugin'] = None
      sys.modules[f'jax_plugins.xla_cuda{version}'] = types.SimpleNamespace(
        initialize=lambda: None
      )
  try:
    import jax
  except ValueError as e:  # of a variable, which it names in small letters too
    found = re.search(r'jax_\w+', str(e), re.IGNORECASE)
    name = found[0].upper() if found else ''
    if name not in os.environ:
      raise
    raise UserError(
      f'{name}={os.environ[name]} is no value that JAX takes: set another, or '
      'unset it'
    ) from None
  return jax


def cluster(environ: Mapping[str, str], hardware: str) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize`, or None for one process.

  JAX finds most clusters itself, but must be asked only where there is one:
  on a single machine the call waits for a coordinator that never comes.

  Args:
    environ: `os.environ`.
    hardware: `accelerator()`.

  Returns:
    Keyword arguments; {} where JAX knows everything.

  Raises:
    UserError: half of a cluster is described; the message says what lacks.
  """
  given = {name: value for name, value in environ.items() if value.strip()}
  count, rank, address = map(
    given.get,
    ('REFRAG_NUM_PROCESSES', 'REFRAG_PROCESS_ID', 'JAX_COORDINATOR_ADDRESS'),
  )
  if count or rank:
    # JAX reads the coordinator's address from the environment, but neither
    # the number of processes nor which one this is.
    if not (count and rank and address):
      raise UserError(
        'set JAX_COORDINATOR_ADDRESS=HOST:PORT, REFRAG_NUM_PROCESSES and '
        'REFRAG_PROCESS_ID together, or none of them'
      )
    if not (count.isdigit() and rank.isdigit() and int(rank) < int(count)):
      raise UserError(
        f'REFRAG_PROCESS_ID={rank} and REFRAG_NUM_PROCESSES={count}: the '
        'processes are numbered from 0 to their number less 1'
      )
    if not re.fullmatch(r'.+:\d+', address):
      raise UserError(
        f'JAX_COORDINATOR_ADDRESS={address}: it is written HOST:PORT'
      )
    return dict(
      coordinator_address=address,
      num_processes=int(count),
      process_id=int(rank),
    )
  # Before SLURM: within its allocation mpirun starts ranks of its own.
  if _count(given, 'OMPI_COMM_WORLD_SIZE') > 1:
    # JAX 0.10 knows mpirun up to Open MPI 4 by this variable; 5 dropped it.
    old = 'OMPI_MCA_orte_hnp_uri' in given
    return dict(cluster_detection_method='ompi' if old else 'mpi4py')
  # srun; a bare sbatch script sets JOB_ID, but no process of its own.
  if all(
    given.get(name)
    for name in (
      'SLURM_JOB_ID',
      'SLURM_STEP_NODELIST',
      'SLURM_NTASKS',
      'SLURM_PROCID',
      'SLURM_LOCALID',
    )
  ):
    # Of this step, which may be smaller than the job; JAX knows the job's.
    tasks = _count(given, 'SLURM_STEP_NUM_TASKS') or _count(
      given, 'SLURM_NTASKS'
    )
    for name in ('SLURM_JOB_ID', 'SLURM_PROCID', 'SLURM_LOCALID'):
      _count(given, name)
    return dict(num_processes=tasks) if tasks > 1 else None
  if address:
    raise UserError(
      'JAX_COORDINATOR_ADDRESS is set, but neither srun nor mpirun started '
      'this process: set REFRAG_NUM_PROCESSES and REFRAG_PROCESS_ID as well'
    )
  if hardware == 'tpu' and environ.get('JAX_PLATFORMS', 'tpu') != 'cpu':
    return {}  # a pod's hosts find each other; one host alone is one process
  return None


def _count(given: Mapping[str, str], name: str) -> int:
  """A launcher's number; 0 where there is none."""
  text = given.get(name, '0').strip()
  if not text.isdecimal():
    raise UserError(
      f'{name}={text} is not a number: unset it, or start this as srun or '
      'mpirun do'
    )
  return int(text)


def join_cluster(seconds: int, heartbeat_seconds: int) -> bool:
  """Joins the cluster, if there is one; to be called before any use of JAX.

  Args:
    seconds: that processes wait for each other.
    heartbeat_seconds: after which a process that is silent counts as dead, and
      the others end.

  Returns:
    Whether this is the first process, the one that prints and writes.

  Raises:
    UserError: half of a cluster is described, or JAX lacks the accelerator.
  """
  hardware = accelerator()
  lacks = jax_build(hardware, versions())
  if lacks and not os.environ.get('JAX_PLATFORMS'):
    raise UserError(
      f'there is an accelerator ({hardware}), but JAX is installed without '
      f'it: pip install "{lacks}", or set JAX_PLATFORMS=cpu to do without'
    )
  arguments = cluster(os.environ, hardware)
  if arguments is None:
    return True
  jax = _import_jax()  # only where there is a cluster
  how = cluster_name(os.environ)

  def give_up():
    # JAX would abort with a page of C++.
    print(
      f'refrag_jax: not all processes came up within {seconds} s ({how}): see '
      'the logs of the others, or set --config.cluster.join_seconds',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  jax.distributed.initialize(
    **arguments,
    initialization_timeout=seconds + 60,
    heartbeat_timeout_seconds=heartbeat_seconds,
  )
  timer.cancel()
  start_jax()
  print(
    f'process {jax.process_index()} of {jax.process_count()}, found by {how}; '
    f'coordinator {arguments.get("coordinator_address", "chosen by JAX")}; '
    f'{jax.local_device_count()} of {jax.device_count()} devices here',
    file=sys.stderr,
    flush=True,
  )
  return jax.process_index() == 0


def cluster_name(environ: Mapping[str, str]) -> str:
  """Who started these processes, for people to read."""
  for variable, name in (
    ('REFRAG_NUM_PROCESSES', 'REFRAG_NUM_PROCESSES'),
    ('OMPI_COMM_WORLD_SIZE', 'Open MPI'),
    ('SLURM_STEP_NODELIST', 'SLURM'),
  ):
    if environ.get(variable):
      return name
  return 'Cloud TPU'


if __name__ == '__main__':
  print(accelerator())
