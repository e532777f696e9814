"""The metrics files over kills and resumes, and what the terminal shows."""

import builtins
import datetime
import io
import json
import time

import jax
import numpy as np
import pytest
import rich
from rich.console import Console

from refrag_jax.errors import UserError
from refrag_jax.runtime import chips, metrics, progress


def lines(workdir, name='metrics.jsonl'):
  text = (workdir / name).read_text(encoding='utf-8')
  found = [json.loads(line) for line in text.splitlines()]
  for line in found:
    if 'time' in line:
      datetime.datetime.fromisoformat(line.pop('time'))
  return found


def train_line(step, loss=1.0, stage='cpt'):
  return {'stage': stage, 'step': step, 'split': 'train', 'loss': loss}


def test_a_line_is_there_at_once(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.scalars('cpt', 3, 'train', {'loss': jax.numpy.float32(0.5)})
  assert lines(tmp_path) == [train_line(3, 0.5)]  # not closed, not lost
  writer.scalars('cpt', 4, 'heldout', {'loss': float('inf')})
  assert lines(tmp_path)[1]['loss'] is None  # JSON has no infinity


def test_a_resumed_run_has_no_doubled_lines(tmp_path):
  def steps(writer, stage, start, stop):
    for step in range(start, stop):
      writer.scalars(stage, step, 'train', {'loss': 1.0})

  writer = metrics.Writer(tmp_path)
  steps(writer, 'lm', 0, 9)
  steps(writer, 'cpt', 0, 5)  # killed here; the checkpoint is of step 3
  writer.samples('cpt', 2, [{'text': 'a'}])
  writer.samples('cpt', 4, [{'text': 'b'}])
  resumed = metrics.Writer(tmp_path)
  resumed.scalars('lm', 9, 'train', {'loss': 1.0})  # its file is open already
  resumed.truncate_from('cpt', 3)
  steps(resumed, 'cpt', 3, 6)
  expected = [train_line(s, stage='lm') for s in range(9)]
  expected += [train_line(s) for s in range(3)]
  expected += [train_line(9, stage='lm')]
  expected += [train_line(s) for s in range(3, 6)]
  assert lines(tmp_path) == expected
  assert [row['step'] for row in lines(tmp_path, 'samples.jsonl')] == [2]


def test_a_torn_line_is_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps(train_line(1)) + '\n{"stage": "cp')
  metrics.Writer(tmp_path).scalars('cpt', 2, 'train', {'loss': 1.0})
  assert lines(tmp_path) == [train_line(1), train_line(2)]


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  writer = metrics.Writer(tmp_path / 'run')
  writer.scalars('cpt', 1, 'train', {'loss': 1.0})
  writer.samples('cpt', 1, [{'text': 'a'}])
  writer.truncate_from('cpt', 0)
  writer.close()
  with progress.Progress('cpt', 10) as bar:
    bar.log(5, {'loss': 1.0})
  assert not (tmp_path / 'run').exists()
  assert capsys.readouterr().out == ''


def test_tensorboard_gets_scalars_of_each_stage(tmp_path):
  pytest.importorskip('tensorboardX')
  writer = metrics.Writer(tmp_path, tensorboard=True)
  writer.truncate_from('lm', 1)
  writer.scalars('lm', 1, 'train', {'loss': 1.0})
  writer.samples('lm', 1, [{'text': 'a'}])
  writer.close()
  events = list((tmp_path / 'tensorboard' / 'lm').iterdir())
  assert events and b'train/loss' in b''.join(e.read_bytes() for e in events)


def test_missing_tensorboardx_is_a_sentence(tmp_path, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == 'tensorboardX':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match='pip install tensorboardX'):
    metrics.Writer(tmp_path, tensorboard=True)


def test_samples_in_a_log_are_single_lines(tmp_path, capsys):
  writer = metrics.Writer(tmp_path)
  writer.samples('cpt', 7, [{'source': 'a\nb', 'output': '\x1b[31mred'}])
  out = capsys.readouterr().out.splitlines()
  assert out == ['cpt 7: samples', '  0 source: a␊b', '  0 output: ␛[31mred']
  assert lines(tmp_path, 'samples.jsonl')[0]['rows'][0]['source'] == 'a\nb'


def terminal(monkeypatch):
  console = Console(file=io.StringIO(), force_terminal=True, width=100)
  monkeypatch.setattr(rich, 'get_console', lambda: console)
  return console.file


def test_samples_on_a_terminal_are_a_table(tmp_path, monkeypatch):
  file = terminal(monkeypatch)
  metrics.Writer(tmp_path).samples('cpt', 7, [{'output': '[bold]kept[/bold]'}])
  assert '[bold]kept[/bold]' in file.getvalue()  # text, not markup
  assert '┃' in file.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
  file = terminal(monkeypatch)
  with progress.Progress('cpt', 400, start_step=100) as bar:
    bar.log(120, {'loss': 1.234})
  assert 'cpt' in file.getvalue() and '120/400' in file.getvalue()
  assert 'loss 1.234' in file.getvalue() and '━' in file.getvalue()
  assert capsys.readouterr().out == ''


def test_say_survives_a_log_without_unicode(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr('sys.stdout', io.TextIOWrapper(raw, encoding='ascii'))
  progress.say('a␊b')
  assert raw.getvalue() == b'a?b\n'


class Clock:
  """Time as the test says it passes."""

  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(time, 'monotonic', lambda: self.now)
    monkeypatch.setattr(time, 'strftime', lambda form: '12:00:00')

  def sleep(self, seconds):
    self.now += seconds


def test_the_plain_line(monkeypatch, capsys):
  clock = Clock(monkeypatch)
  with progress.Progress(
    'cpt', 400, tokens=3075.0, flops=3.1e9, peak=4e10
  ) as bar:
    with bar.excluded('compile'):
      clock.sleep(60.0)
    clock.sleep(30.0)
    rates = bar.log(120, {
      'loss': 1.2341, 'learning_rate': 3e-4, 'grad_norm': 0.512,
      'other': 1.0,
    })  # fmt: skip
  assert capsys.readouterr().out == (
    'cpt  120/400  loss 1.234  lr 3.0e-04  grad 0.51  12.3k tok/s'
    '  mfu 31%  eta 0:01:10  12:00:00\n'
  )
  assert rates['step_s'] == pytest.approx(0.25)
  assert bar.excluded_s == {'compile': 60.0}


def test_parts_of_work_are_told_now_and_then(monkeypatch, capsys):
  clock, phases = Clock(monkeypatch), []
  monkeypatch.setattr(progress.watchdog, 'phase', phases.append)
  tally = progress.Tally('preparing text')
  tally('reading', 7, 8)
  for done, sign in ((0, 0), (2, 0), (2, 1), (4, 1), (4, 1), (8, 1)):
    tally('tokenising', done, 10, sign)
    clock.sleep(4.0)
  # After 12 seconds, and not again within 10; at the speed of the stage.
  assert capsys.readouterr().out == (
    'preparing text: tokenising  4 of 10 shards  eta 0:00:18\n'
  )
  assert phases == ['preparing text, reading, 7 of 8'] + [
    f'preparing text, tokenising, {n} of 10' for n in (0, 2, 2, 4, 8)
  ]


def test_evaluations_slow_the_eta_but_no_rate(monkeypatch):
  clock = Clock(monkeypatch)
  bar = progress.Progress('cpt', 20, tokens=10.0)
  clock.sleep(10.0)
  with bar.excluded('eval'):
    clock.sleep(10.0)
  assert bar.log(10, {})['tokens_per_s'] == pytest.approx(10.0)
  clock.sleep(5.0)  # the second interval does not see the evaluation
  assert bar.log(15, {})['tokens_per_s'] == pytest.approx(10.0)


def test_the_eta_counts_work_not_steps(monkeypatch, capsys):
  """The second half of the curriculum has steps three times as large."""
  clock = Clock(monkeypatch)
  bar = progress.Progress('cpt', 20, flops=np.repeat([1e9, 3e9], 10))
  clock.sleep(10.0)
  bar.log(10, {})
  assert capsys.readouterr().out.endswith('eta 0:00:30  12:00:00\n')


def test_a_resumed_stage_counts_from_where_it_was(monkeypatch, capsys):
  clock = Clock(monkeypatch)
  bar = progress.Progress('cpt', 100, start_step=90)
  clock.sleep(5.0)
  bar.log(95, {})
  assert capsys.readouterr().out == 'cpt   95/100  eta 0:00:05  12:00:00\n'
  assert bar.log(95, {}) == {}  # nothing done since: no rate, no crash


@pytest.mark.parametrize(
  ('value', 'text'),
  [(0, '0'), (999, '999'), (999.9, '1.00k'), (1234, '1.23k'), (12345, '12.3k'),
   (123456, '123k'), (999600, '1.00M'), (2.5e9, '2.50G'),
   (float('nan'), 'nan')],
)  # fmt: skip
def test_format_count(value, text):
  assert progress.format_count(value) == text


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0, '0:00:00'), (71.6, '0:01:12'), (3600, '1:00:00'),
   (93784, '1d 02:03:04')],
)  # fmt: skip
def test_format_duration(seconds, text):
  assert progress.format_duration(seconds) == text


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12),
   ('NVIDIA H200', 989e12), ('NVIDIA A100-SXM4-80GB', 312e12),
   ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5e', 197e12),
   ('TPU v5', 459e12), ('TPU v5p', 459e12), ('TPU v6 lite', 918e12),
   ('TPU v6e', 918e12), ('cpu', None), ('NVIDIA T4', None)],
)  # fmt: skip
def test_peak_flops_by_device_kind(kind, peak):
  chip = chips.of_device(kind)
  assert (chip and chip.flops) == peak


def test_the_peak_of_a_cpu_is_measured_once_a_process(monkeypatch):
  monkeypatch.setattr(progress, 'measure_matmul_flops', lambda: 5e10)
  cpu = jax.devices('cpu')[0]
  assert progress.machine_peak([cpu] * 8) == (
    5e10, 'mfu of measured matmul peak'
  )  # fmt: skip


def test_measured_matmul_flops_are_plausible():
  assert 1e8 < progress.measure_matmul_flops(size=256, seconds=0.05) < 1e14
