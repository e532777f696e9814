"""All arms of configs/repro.py, two steps a stage, by the command itself."""

import os
import pathlib
import subprocess
import sys
import time

import fake_arms
import pytest
from xla import UNOPTIMISED

from configs import repro
from refrag_jax.repro import records
from refrag_jax.runtime import files
from refrag_jax.runtime.environment import ROOT

MINUTES = 10  # beside the other slow tests; alone on two cores 5
ARMS = tuple(repro.get_config('smoke').repro.arm)


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
  """Workdir of a finished run, and the seconds that it took."""
  root = tmp_path_factory.mktemp('smoke')
  environ = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(root / 'cache'),
    'JAX_NUM_CPU_DEVICES': '1',
    'PYTHONPATH': ROOT,
    'XLA_FLAGS': UNOPTIMISED,
  }

  def run(*calls):
    """Calls with these arms each, at once."""
    running = []
    for arms in calls:
      log = root / f'{len(os.listdir(root))}.log'
      with open(log, 'w', encoding='utf-8') as f:
        command = [
          sys.executable, '-m', 'refrag_jax.main', '--mode=repro',
          '--config=configs/repro.py:smoke', f'--workdir={root / "run"}',
          f'--config.repro.arms=({",".join(arms)})',
        ]  # fmt: skip
        running.append((log, subprocess.Popen(
          command, cwd=ROOT, env=environ, stdout=f, stderr=subprocess.STDOUT,
        )))  # fmt: skip
    for log, process in running:
      assert process.wait() == 0, log.read_text(encoding='utf-8')[-3000:]

  clock = time.monotonic()
  # As docs/repro.md spreads arms over two cores; then one call for the verdicts.
  run(['main'], ['small_decoder'])
  rest = [arm for arm in ARMS if arm not in ('main', 'small_decoder')]
  chained = [arm for arm in rest if arm.startswith('cepe')]
  others = [arm for arm in rest if arm not in chained]
  half = len(others) // 2
  run(others[: half + 1], chained + others[half + 1 :])
  run([])
  return str(root / 'run'), time.monotonic() - clock


@pytest.mark.slow
def test_all_arms_within_minutes(smoke):
  workdir, seconds = smoke
  assert len(os.listdir(os.path.join(workdir, 'seed0'))) == len(ARMS) == 17
  assert seconds < 60 * MINUTES


@pytest.mark.slow
def test_every_cell_of_the_claims_is_measured(smoke):
  """A claim whose row no eval makes would be 'not testable' for ever."""
  found = records.load(smoke[0])
  assert not found.notes and len(found.runs) == len(ARMS) == 17
  cells = fake_arms.cells_of(fake_arms.claims_file(), 'repro_smoke')
  assert len(cells) > 80  # of the file as it stands, 87
  assert records.lacking(found, cells) == []
  # The check can fail.
  assert records.lacking(found, ['main/log_perplexity/refrag_k9/P16'])


@pytest.mark.slow
def test_the_report_is_whole(smoke):
  text = pathlib.Path(smoke[0], 'RESULTS.md').read_text(encoding='utf-8')
  for number in range(1, 11):
    assert f'### {number}. ' in text
  for run in records.load(smoke[0]).runs.values():
    assert run.results['date'].endswith('UTC')
    numbers = files.read_json(os.path.join(run.directory, 'documents.json'))
    assert numbers['datasets'].keys() == {'stdlib'}
