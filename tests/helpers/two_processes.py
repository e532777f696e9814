"""Two real processes on this machine, as a cluster would start them."""

import os
import socket
import subprocess
import sys

from refrag_jax.runtime.environment import ROOT


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def last_lines(script: str, devices: int = 1) -> list[str]:
  """Runs a script in both; the last line that each prints, by rank.

  Args:
    devices: of each process, of the CPU.
  """
  common = os.environ | {
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}',
    'REFRAG_NUM_PROCESSES': '2',
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  both = [
    subprocess.Popen(
      [sys.executable, '-c', script],
      env=common | {'REFRAG_PROCESS_ID': str(rank)},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  return [p.communicate(timeout=300)[0].splitlines()[-1] for p in both]
