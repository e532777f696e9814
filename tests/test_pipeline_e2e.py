"""The whole chain by the command line, at two steps a stage; minutes.

Every stage, control arm and eval runs on the embedded text; then again, from
the checkpoints, and on eight devices.
"""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from xla import UNOPTIMISED

from configs import tiny
from refrag_jax.config import check
from refrag_jax.runtime.environment import ROOT

pytestmark = pytest.mark.slow
STAT = {'mean', 'se', 'n'}
CONFIG = tiny.get_config('smoke')


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Runs `main` with the smoke config in a process of its own."""
  cache = tmp_path_factory.mktemp('xla')

  def run(workdir, *arguments, devices=1):
    flags = f'{UNOPTIMISED} --xla_force_host_platform_device_count={devices}'
    return subprocess.run(
      [
        *(sys.executable, '-m', 'refrag_jax.main'),
        '--config=configs/tiny.py:smoke',
        f'--workdir={workdir}',
        *arguments,
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'XLA_FLAGS': flags,
      },
    )

  return run


@pytest.fixture(scope='module')
def workdir(command, tmp_path_factory):
  """Of a finished run."""
  workdir = tmp_path_factory.mktemp('runs') / 'smoke'
  done = command(workdir)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.splitlines()[-1].startswith('done: ')
  return workdir


@pytest.fixture(scope='module')
def numbers(workdir):
  return read(workdir)


def read(workdir) -> dict:
  with open(os.path.join(workdir, 'results.json')) as f:
    return json.load(f, parse_constant=pytest.fail)  # NaN is no JSON


def assert_stat(value, unit=None):
  assert value.keys() == STAT, value
  assert np.isfinite(value['mean'])
  assert value['n'] == 1 or value['se'] >= 0
  if unit:
    assert value['n'] == unit


def assert_rows(rows, columns):
  """Rows of STATs by column, each compared with others on the same ones."""
  for name, row in rows.items():
    if isinstance(row, str):  # a note
      continue
    for column in columns:
      assert_stat(row[column])
    for other, differences in row['vs'].items():
      assert other in rows and other != name
      for column, value in differences.items():
        assert_stat(value, row[column]['n'])
        mean = row[column]['mean'] - rows[other][column]['mean']
        np.testing.assert_allclose(value['mean'], mean, atol=1e-6)


def test_the_head_says_what_ran(numbers):
  assert numbers['config'] == 'tiny_smoke'
  assert {'python', 'jax', 'flax', 'numpy'} <= numbers['versions'].keys()
  assert {'git', 'corpus', 'device', 'fingerprint'} <= numbers.keys()


def test_every_stage_has_its_record(numbers):
  """The keys of results.json that others rely on."""
  assert list(numbers['stages']) == list(CONFIG.stages)
  for name, record in numbers['stages'].items():
    assert record['steps'] == 2
    before, after, gain = (
      record[key] for key in ('heldout_before', 'heldout_after', 'paired_gain')
    )
    for value in (before, after, gain):
      assert_stat(value, before['n'])
    sign = -1 if name == 'grpo' else 1
    np.testing.assert_allclose(
      gain['mean'], sign * (before['mean'] - after['mean']), atol=1e-6
    )
    assert record['measures'] == ('reward' if name == 'grpo' else 'loss')
    assert record['frozen_unchanged'] is True
    assert record['trainable_params'] > 0 and record['frozen_params'] > 0
    assert record['wall_s'] > 0 and record['compile_s'] > 0
    assert record['tokens_per_s'] > 0
  sizes = {
    record['trainable_params'] + record['frozen_params']
    for record in numbers['stages'].values()
  }
  assert len(sizes) == 1


def test_stages_follow_each_other(numbers):
  """A stage begins where the one before it ended, on the same held-out rows."""
  stages = numbers['stages']
  for name, before in (('mixed_trained', 'cpt_trained'),):
    np.testing.assert_allclose(
      stages[name]['heldout_before']['mean'],
      stages[before]['heldout_after']['mean'],
      atol=1e-6,
    )


def test_every_eval_has_its_table(numbers):
  assert numbers['evals'].keys() == set(CONFIG.evals)
  (rows,) = numbers['evals']['log_perplexity'].values()
  assert_rows(rows, ('P4', 'P8', 'P16'))
  plain = {'no_context', 'full_context', 'last_k'}
  assert plain | {f'{row}_trained' for row in plain} <= rows.keys()
  assert {'refrag_k8', 'refrag_k8_shuffled'} <= rows.keys()
  for name in check.SELECTORS:
    for p in ('0.125', '0.25'):
      assert f'refrag_k8_{name}_p{p}' in rows
  assert {'no_context_trained', 'refrag_k8_shuffled'} <= (
    rows['refrag_k8']['vs'].keys()
  )
  (rows,) = numbers['evals']['reconstruction'].values()
  assert_rows(rows, ('P8', 'P16', 'P32', 'P64'))
  (rows,) = numbers['evals']['qa'].values()
  assert_rows(rows, ('gold_nll',))
  for name, row in rows.items():
    if name != 'replug' and not isinstance(row, str):  # it writes nothing
      assert_stat(row['em'])
      assert_stat(row['f1'])
  assert {'no_passage', 'gold', 'gold_distractors', 'bm25', 'shuffled'} <= (
    rows.keys()
  )


def test_selection_lists_every_selector_and_rate(numbers):
  (rows,) = numbers['evals']['selection'].values()
  seen = {
    (row['selector'], row['p'], row.get('tail_expanded', False)) for row in rows
  }
  for tail in (False, True):
    for name in check.SELECTORS:
      for p in (0.125, 0.25):
        assert (name, p, tail) in seen
  for row in rows:
    assert_stat(row['nll'])
    assert 1 < row['rate'] <= 8
    if row['selector'] != 'none':
      assert_stat(row['vs_random'], row['nll']['n'])
      assert_stat(row['vs_last'], row['nll']['n'])


def test_a_run_leaves_its_files(workdir):
  for name in ('config.json', 'metrics.jsonl', 'samples.jsonl', 'report.html'):
    assert (workdir / name).stat().st_size > 0
  assert sorted(os.listdir(workdir / 'checkpoints')) == sorted(CONFIG.stages)
  half = [
    path
    for path, _, files in os.walk(workdir)
    for name in (*files, os.path.basename(path))
    if '.writing-' in name or 'orbax-checkpoint-tmp' in name
  ]
  assert half == []
  text = (workdir / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  for name in CONFIG.stages:
    mine = [x for x in lines if x['stage'] == name]
    assert [x['step'] for x in mine if x['split'] == 'train'] == [1, 2]
    assert [x['step'] for x in mine if x['split'] == 'heldout'] == [0, 2]


def test_the_report_needs_nothing_else(workdir):
  page = (workdir / 'report.html').read_text()
  assert page.rstrip().endswith('</html>')
  links = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]+)', page)
  assert [x for x in links if not x.startswith(('#', 'data:'))] == []
  assert not re.search(r'@import|url\(\s*["\']?(?!data:|#)', page)
  for name in CONFIG.stages:
    assert name in page


def test_the_second_start_says_that_all_is_done(command, workdir, numbers):
  metrics = (workdir / 'metrics.jsonl').read_text()
  start = time.monotonic()
  again = command(workdir)
  seconds = time.monotonic() - start
  assert again.returncode == 0, again.stderr
  assert again.stdout.splitlines()[-1].startswith('all done: ')
  assert seconds < 60  # 4 s here; the machine may be busy with other tests
  assert read(workdir) == numbers
  assert (workdir / 'metrics.jsonl').read_text() == metrics


def test_eval_mode_gives_the_same_numbers(command, workdir, numbers, tmp_path):
  """From a stage's checkpoint and its siblings, into another workdir."""
  done = command(
    tmp_path,
    '--mode=eval',
    f'--config.init_from={workdir}/checkpoints/grpo',
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert read(tmp_path)['evals'] == numbers['evals']
  mine, theirs = read(tmp_path)['checkpoints'], numbers['checkpoints']
  assert theirs['mixed'] == {'checkpoint': 'checkpoints/mixed', 'step': 2}
  assert mine['mixed'] == {
    'checkpoint': f'{workdir}/checkpoints/mixed',
    'step': 2,
  }
  assert (tmp_path / 'report.html').exists()
  assert not (tmp_path / 'checkpoints').exists()


def test_a_runs_directory_stands_for_its_checkpoints(
  command, workdir, numbers, tmp_path
):
  done = command(
    tmp_path,
    '--mode=eval',
    f'--config.init_from={workdir}',
    '--config.evals=reconstruction',
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = read(tmp_path)['evals']['reconstruction']
  assert found == numbers['evals']['reconstruction']


def test_eval_on_eight_devices_gives_the_same_numbers(
  command, workdir, numbers, tmp_path
):
  done = command(
    tmp_path,
    '--mode=eval',
    f'--config.init_from={workdir}/checkpoints/grpo',
    '--config.mesh.fsdp=2',
    devices=8,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  got = read(tmp_path)
  assert got['device'].startswith('8 x ')
  assert_near(got['evals'], numbers['evals'])


def assert_near(got, want, where=''):
  if isinstance(want, dict):
    assert got.keys() == want.keys(), where
    for key in want:
      assert_near(got[key], want[key], f'{where}/{key}')
  elif isinstance(want, list):
    assert len(got) == len(want), where
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
      assert_near(x, y, f'{where}/{i}')
  elif isinstance(want, float):
    assert got == pytest.approx(want, abs=1e-4), where
  else:
    assert got == want, where


def test_another_config_is_refused_by_name(command, workdir, numbers):
  """The same workdir, other settings: exit 2, one line, nothing overwritten."""
  done = command(workdir, '--config.stage.lm.num_train_steps=1')
  assert done.returncode == 2
  assert 'num_train_steps was 2 and is 1' in done.stderr
  assert 'Traceback' not in done.stderr
  longer = command(workdir, '--config.stage.lm.num_train_steps=3')
  assert longer.returncode == 2
  assert 'lm would go on longer, and reconstruct was' in longer.stderr
  assert read(workdir) == numbers


def test_training_on_eight_devices(command, workdir, tmp_path):
  """The same losses as on one, but for the order of sums."""
  done = command(tmp_path, '--config.stages=lm', '--config.evals=()', devices=8)
  assert done.returncode == 0, done.stderr[-2000:]
  assert '8 x cpu' in done.stdout
  there, here = read(workdir)['stages']['lm'], read(tmp_path)['stages']['lm']
  for key in ('heldout_before', 'heldout_after'):
    np.testing.assert_allclose(here[key]['mean'], there[key]['mean'], rtol=1e-5)
