"""Accelerators that need not be there: their numbers, devices to compile for.

Names: `h100:8x8` is 8 hosts of 8 cards, `v5p:4x4x4` a TPU slice by its shape,
`v5p:4x4x4@2` two of them, `cpu:8` eight fake devices of this machine.
"""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from refrag_jax.config import typed
from refrag_jax.config.schema import ClusterConfig
from refrag_jax.errors import UserError
from refrag_jax.runtime.chips import CHIPS, Chip

# What XLA's GPU compiler asks about a card: gpu_specs/*.txtpb in OpenXLA's
# tools/hlo_opt has h100_sxm, a100_sxm_80 and b200; an H200 is an H100 with
# other memory.
_HOPPER = dict(
  major=9, cores=132, fpus=128, shared=233_472, shared_optin=232_448,
  l2=52_428_800, clock=1.98,
)  # fmt: skip
CARDS = {
  'a100': dict(
    major=8, cores=108, fpus=64, shared=167_936, shared_optin=166_912,
    l2=41_943_040, clock=1.41, name='NVIDIA A100-SXM4-80GB',
  ),
  'h100': _HOPPER | dict(name='NVIDIA H100 80GB HBM3'),
  'h200': _HOPPER | dict(name='NVIDIA H200'),
  'b200': dict(
    major=10, cores=148, fpus=128, shared=233_472, shared_optin=232_448,
    l2=132_644_864, clock=1.965, name='NVIDIA B200',
  ),
}  # fmt: skip
# Deviceless there is nothing to tune on, and Triton would ask for the tuner.
GPU_OPTIONS = {
  'xla_gpu_autotune_level': 0,
  'xla_gpu_enable_triton_gemm': False,
}


THREE_AXES = ('v4', 'v5p', 'tpu7x')  # of its torus; v5e and v6e have two


@contextlib.contextmanager
def compiler_output() -> Iterator[None]:
  """Keeps what C++ writes to stderr from people, unless something goes wrong.

  The plug-ins complain at length that there is no card.
  """
  sys.stderr.flush()
  with tempfile.TemporaryFile() as file:
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield
    except UserError:
      raise
    except BaseException:
      file.seek(0)
      os.write(kept, file.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(kept, 2)
      os.close(kept)


class Topology(NamedTuple):
  name: str
  chip: Chip
  devices: Sequence[Any]  # of JAX; programs compile for them
  near: int  # devices that reach each other at chip.near_rate
  options: dict[str, Any]  # of the compiler


def parse(name: str) -> tuple[str, tuple[int, ...], int]:
  """('h100', (8, 8), 1) of 'h100:8x8'; the last one are TPU slices.

  Raises:
    UserError: there is no such chip, or no such shape of it.
  """
  kind, _, shape = name.partition(':')
  shape, at, slices = shape.partition('@')
  if kind not in CHIPS:
    hint = typed.did_you_mean(kind, CHIPS)
    raise UserError(
      f'--topology={name}: no chip {kind!r}{hint or ""}; there are '
      f'{", ".join(CHIPS)}'
    )
  example = '4x4x4' if kind in THREE_AXES else '4x4'
  example = {'cuda': '8x8', 'cpu': '8'}.get(CHIPS[kind].platform, example)
  platform = CHIPS[kind].platform
  if (
    not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape)
    or shape.count('x') != example.count('x')
    or (at and not (platform == 'tpu' and re.fullmatch(r'[1-9]\d*', slices)))
  ):
    more = {
      'cuda': ', hosts x cards',
      'tpu': f'; two slices: {kind}:{example}@2',
    }
    raise UserError(
      f'--topology={name}: it is written {kind}:{example}'
      f'{more.get(platform, "")}'
    )
  return kind, tuple(map(int, shape.split('x'))), int(slices or 1)


def load(name: str) -> Topology:
  """Devices to compile for.

  Raises:
    UserError: there is no such topology, or its compiler is not installed.
  """
  kind, shape, slices = parse(name)
  chip = CHIPS[kind]
  jax.config.update('jax_platforms', 'cpu')  # nothing is looked for
  if chip.platform == 'cpu':
    return _cpu(name, chip, shape[0])
  with compiler_output():
    if chip.platform == 'cuda':
      return _gpu(name, kind, shape, chip)
    return _tpu(name, kind, shape, slices, chip)


def _cpu(name: str, chip: Chip, number: int) -> Topology:
  with contextlib.suppress(RuntimeError):  # JAX has made its devices already
    jax.config.update('jax_num_cpu_devices', number)
  if jax.device_count() < number:
    raise UserError(
      f'--topology={name}: this process has {jax.device_count()} devices; '
      f'unset XLA_FLAGS'
    )
  return Topology(name, chip, jax.devices()[:number], number, {})


def _gpu(name: str, kind: str, shape: tuple[int, ...], chip: Chip) -> Topology:
  compiler = _where('nvidia.cuda_nvcc')
  if not compiler or not _where('jax_plugins.xla_cuda12'):
    raise _lacks(name, 'plan-gpu')
  from jax.experimental import topologies

  hosts, cards = shape
  options = GPU_OPTIONS | {'xla_gpu_cuda_data_dir': compiler}
  found = topologies.get_topology_desc(
    platform='cuda',
    topology_name=kind,
    topology=f'1x{hosts}x{cards}',
    target_config=target_config(kind),
  )
  return Topology(name, chip, found.devices, cards, options)


def target_config(kind: str) -> str:
  """A card as XLA's GPU compiler wants to know it."""
  card, chip = CARDS[kind], CHIPS[kind]
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card['shared']}
  shared_memory_per_block_optin: {card['shared_optin']}
  threads_per_core_limit: 2048
  core_count: {card['cores']}
  fpus_per_core: {card['fpus']}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm_rate)}
  l2_cache_size: {card['l2']}
  clock_rate_ghz: {card['clock']}
  device_memory_size: {chip.hbm}
  cuda_compute_capability {{ major: {card['major']} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{card['name']}"
"""


def _tpu(
  name: str, kind: str, shape: tuple[int, ...], slices: int, chip: Chip
) -> Topology:
  if not _where('libtpu'):
    raise _lacks(name, 'plan-tpu')
  # Else libtpu asks the cloud's metadata server what this machine is.
  for key, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v5p-128'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_WORKER_ID', '0'),
  ):
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  options = dict(num_slices=slices)
  if kind in ('v4', 'v5p'):  # both cores of a chip are one device
    options |= dict(
      chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1)
    )
  try:
    found = topologies.get_topology_desc(
      platform='tpu',
      topology_name=f'{kind}:{"x".join(map(str, shape))}',
      **options,
    )
  except Exception as e:  # of the plug-in, for a shape that is not built
    reason = str(e).strip().split('\n')[0][:200]
    raise UserError(f'--topology={name}: {reason}') from None
  near = len(found.devices) // slices
  return Topology(name, chip, found.devices, near, {})


def flags(there: Topology, cluster: ClusterConfig) -> dict[str, Any]:
  """The flags that a run over there has, as options of the compiler."""
  given = {'cuda': cluster.xla_flags, 'tpu': cluster.libtpu_flags}
  words = {'true': True, 'false': False}
  pairs = (
    flag.removeprefix('--').partition('=')[::2]
    for flag in given.get(there.chip.platform, ())
  )
  return {name: words.get(value, value) for name, value in pairs}


def exhausted(message: str, chip: Chip) -> dict[str, int]:
  """What a TPU's compiler needed at least, by its refusal."""
  used = re.search(r'(?:Used |\()([\d.]+)([KMG])(?: of|\) exceeds)', message)
  size = float(used[1]) * 1024 ** ('KMG'.index(used[2]) + 1) if used else 0
  peak = max(int(size), chip.hbm + 1)
  return {'argument_bytes': 0, 'temp_bytes': 0, 'peak_bytes': peak}


def _where(package: str) -> str:
  """The directory of a package, '' if it is not installed."""
  try:
    spec = importlib.util.find_spec(package)
  except ModuleNotFoundError:
    return ''
  return spec.submodule_search_locations[0] if spec else ''


def _lacks(name: str, extra: str) -> UserError:
  return UserError(
    f'--topology={name} needs a compiler that is not installed: '
    f'in the folder of refrag_jax, {sys.executable} -m pip install '
    f'".[{extra}]"'
  )
