"""All arms of configs/repro.py, two steps a stage, by the command itself."""

import os
import pathlib
import subprocess
import sys
import time

import fake_arms
import pytest

from refrag_jax import records, results
from refrag_jax.environment import ROOT

MINUTES = 5  # on two cores, cold compilation cache


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
  """Workdir of a finished run, and the seconds that it took."""
  root = tmp_path_factory.mktemp('smoke')
  environ = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(root / 'cache'),
    'JAX_NUM_CPU_DEVICES': '1',
    'PYTHONPATH': ROOT,
  }
  clock = time.monotonic()
  done = subprocess.run(
    [
      sys.executable, '-m', 'refrag_jax.main', '--mode=repro',
      '--config=configs/repro.py:smoke', f'--workdir={root / "run"}',
    ],
    cwd=ROOT, env=environ, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return str(root / 'run'), time.monotonic() - clock


@pytest.mark.slow
def test_all_arms_within_minutes(smoke):
  workdir, seconds = smoke
  assert len(os.listdir(os.path.join(workdir, 'seed0'))) == 17
  assert seconds < 60 * MINUTES


@pytest.mark.slow
def test_every_cell_of_the_claims_is_measured(smoke):
  """A claim whose row no eval makes would be 'not testable' for ever."""
  found = records.load(smoke[0])
  assert not found.notes and len(found.runs) == 17
  cells = fake_arms.cells_of(fake_arms.claims_file(), 'repro_smoke')
  assert len(cells) > 100
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
    numbers = results.read_json(os.path.join(run.directory, 'documents.json'))
    assert numbers['datasets'].keys() == {'stdlib'}
