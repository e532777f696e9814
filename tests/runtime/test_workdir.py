"""One run a workdir at a time."""

import os
import signal
import subprocess
import sys

import pytest

from refrag_jax import main
from refrag_jax.errors import UserError
from refrag_jax.runtime import workdir
from refrag_jax.runtime.environment import ROOT

HOLDS = """
import sys, time
from refrag_jax.runtime import workdir
with workdir.held(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds tmp_path/run."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDS, str(tmp_path / 'run')],
    cwd=ROOT,
    stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == b'held\n'
  yield process
  process.kill()
  process.wait()


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_second_start_says_who_holds_it(holder, tmp_path, capsys, mode):
  argv = ['--config=configs/tiny.py:smoke', f'--workdir={tmp_path / "run"}']
  assert main.main([*argv, f'--mode={mode}']) == 2
  said = capsys.readouterr().err
  assert f'is held by another run (process {holder.pid} on ' in said
  assert said.count('\n') == 1
  assert os.listdir(tmp_path / 'run') == [workdir.NAME]  # nothing was written
  # A killed run holds nothing.
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with workdir.held(str(tmp_path / 'run')):
    pass


def test_the_same_workdir_may_be_held_again(tmp_path):
  for _ in range(2):
    with workdir.held(str(tmp_path)):
      with pytest.raises(UserError, match=f'process {os.getpid()} on '):
        with workdir.held(str(tmp_path)):
          pass
