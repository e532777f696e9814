"""What this process runs in: versions, accelerator, cluster, compile cache.

No JAX and nothing outside the standard library: `main` asks before JAX is
imported, and `launch/setup.sh` before anything is installed:

  python -m refrag_jax.environment     # prints nvidia, tpu or cpu
"""

import contextlib
import functools
import glob
import importlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from refrag_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
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


def set_compilation_cache(environ: dict[str, str]) -> str:
  """Makes JAX keep its compiled programs, so that a second start is quick.

  Through environment variables, which JAX reads at its import: so `main` can
  do it for every mode without importing JAX itself.

  Args:
    environ: `os.environ`; what it already sets is left alone.

  Returns:
    The cache's directory.
  """
  home = os.path.expanduser(environ.get('XDG_CACHE_HOME') or '~/.cache')
  environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', os.path.join(home, 'refrag_jax', 'xla')
  )
  # JAX's defaults leave out what compiled in under a second, most of a run of
  # a small model.
  environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  return environ['JAX_COMPILATION_CACHE_DIR']


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
  }.get(hardware, ('', ()))
  if flags:
    environ[name] = ' '.join([*flags, environ.get(name, '')]).strip()


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
  count, rank = (
    environ.get('REFRAG_NUM_PROCESSES'),
    environ.get('REFRAG_PROCESS_ID'),
  )
  # srun; a bare sbatch script sets JOB_ID, but no process of its own.
  slurm = all(
    environ.get(name)
    for name in (
      'SLURM_JOB_ID',
      'SLURM_STEP_NODELIST',
      'SLURM_NTASKS',
      'SLURM_PROCID',
      'SLURM_LOCALID',
    )
  )
  if count or rank:
    # JAX reads the coordinator's address from the environment, but neither
    # the number of processes nor which one this is.
    address = environ.get('JAX_COORDINATOR_ADDRESS')
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
    return dict(
      coordinator_address=address,
      num_processes=int(count),
      process_id=int(rank),
    )
  if slurm:
    return {} if int(environ['SLURM_NTASKS']) > 1 else None
  if int(environ.get('OMPI_COMM_WORLD_SIZE', '1')) > 1:
    # JAX 0.10 knows mpirun up to Open MPI 4 by this variable; 5 dropped it.
    if 'OMPI_MCA_orte_hnp_uri' in environ:
      return {}
    return dict(cluster_detection_method='mpi4py')
  if environ.get('JAX_COORDINATOR_ADDRESS'):
    raise UserError(
      'JAX_COORDINATOR_ADDRESS is set, but neither srun nor mpirun started '
      'this process: set REFRAG_NUM_PROCESSES and REFRAG_PROCESS_ID as well'
    )
  if hardware == 'tpu' and environ.get('JAX_PLATFORMS', 'tpu') != 'cpu':
    return {}  # a pod's hosts find each other; one host alone is one process
  return None


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
  jax = importlib.import_module('jax')  # only where there is a cluster
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
    ('SLURM_STEP_NODELIST', 'SLURM'),
    ('OMPI_COMM_WORLD_SIZE', 'Open MPI'),
  ):
    if environ.get(variable):
      return name
  return 'Cloud TPU'


if __name__ == '__main__':
  print(accelerator())
