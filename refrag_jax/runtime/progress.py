"""A stage on the terminal, its speed, and the peaks that MFU is measured by.

Formatting and rates are pure functions; the clock is read in `Progress` alone.
"""

import contextlib
import errno
import functools
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
from rich import progress as rich_progress

from refrag_jax.runtime import chips, stopping, watchdog

SAY_EVERY = 10.0  # seconds between two lines of work that has no steps
_last_line = [0.0]  # when, by time.monotonic

# What a log line shows of a step's metrics: key, label, format.
FIELDS = (
  ('loss', 'loss', '.3f'),
  ('reward', 'reward', '.4f'),
  ('learning_rate', 'lr', '.1e'),
  ('grad_norm', 'grad', '.2f'),
  ('encoder_cut', 'cut', '.1%'),
)


class Progress:
  """One stage on the terminal: a live bar, or one line a log interval.

  Steps of one stage differ in size (each curriculum factor has its own
  shapes), so rates and the ETA count work, not steps. Time spent inside
  `excluded` is in no rate; of the ETA only compilation is left out, because
  evaluations and checkpoints come again and compiles do not.
  """

  def __init__(
    self,
    stage: str,
    num_steps: int,
    start_step: int = 0,
    tokens: np.ndarray | float = 0,
    flops: np.ndarray | float = 0,
    peak: float | None = None,
  ):
    """Starts the clock.

    Args:
      stage: its name.
      num_steps: steps of the whole stage.
      start_step: steps that an earlier run has made.
      tokens: tokens of a step over all devices, or [num_steps] of them.
      flops: model FLOPs of a step over all devices, or [num_steps] of them.
      peak: FLOP/s of all devices together (`machine_peak`); None: no MFU.
    """
    self.stage, self.num_steps, self.start_step = stage, num_steps, start_step
    self.excluded_s: dict[str, float] = {}
    self._tokens = np.broadcast_to(np.float64(tokens), (num_steps,))
    self._flops = np.broadcast_to(np.float64(flops), (num_steps,))
    self._peak = peak
    self._start = self._last = time.monotonic()
    self._last_step, self._last_excluded = start_step, 0.0
    self._bar = self._task = None

  def __enter__(self) -> 'Progress':
    if jax.process_index() == 0 and rich.get_console().is_terminal:
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn('{task.description}', style='bold'),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn('{task.fields[text]}'),
        console=rich.get_console(),
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(
        self.stage, total=self.num_steps, completed=self.start_step, text=''
      )
      self._bar.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._bar:
      self._bar.stop()

  @contextlib.contextmanager
  def excluded(self, why: str) -> Iterator[None]:
    """Time in here is not training: 'compile', 'eval', 'checkpoint'."""
    start = time.monotonic()
    try:
      yield
    finally:
      spent = time.monotonic() - start
      self.excluded_s[why] = self.excluded_s.get(why, 0.0) + spent

  def silent_s(self) -> float:
    """Seconds since the last log line."""
    return time.monotonic() - self._last

  def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Shows that `step` steps are done; call it once a log interval.

    Returns:
      The interval's `step_s`, `tokens_per_s` and `mfu`, as far as known.
    """
    now, excluded = time.monotonic(), sum(self.excluded_s.values())
    seconds = now - self._last - (excluded - self._last_excluded)
    done = slice(self._last_step, step)
    rates = interval_rates(
      seconds, self._tokens[done], self._flops[done], self._peak
    )
    work = self._flops if self._flops.any() else self._tokens
    work = work if work.any() else np.ones(self.num_steps)
    eta = eta_seconds(
      now - self._start - self.excluded_s.get('compile', 0.0),
      work[self.start_step : step].sum(),
      work[step:].sum(),
    )
    self._last, self._last_step, self._last_excluded = now, step, excluded
    text = format_metrics(metrics, rates, eta)
    if self._bar:
      _last_line[0] = now
      self._bar.update(self._task, completed=step, text=text)
    else:
      say(
        f'{self.stage}  {step:>{len(str(self.num_steps))}}'
        f'/{self.num_steps}  {text}  {time.strftime("%H:%M:%S")}'
      )
    return rates


class Tally:
  """Work that is done in parts: now and then a line, to the watchdog each."""

  def __init__(self, what: str, unit: str = 'shards'):
    self._what, self._unit = what, unit
    self._last: tuple | None = None
    self._began = self._said = time.monotonic()
    self._done_before = 0

  def __call__(self, stage: str, done: int, total: int, sign: int = 0) -> None:
    """Takes note that a stage of the work has so many parts done.

    Args:
      sign: of life within a part: anything that changes.
    """
    now = time.monotonic()
    if self._last is None or stage != self._last[0]:
      self._began, self._done_before = now, done
    if (stage, done, sign) != self._last:
      self._last = stage, done, sign
      watchdog.phase(f'{self._what}, {stage}, {done} of {total}')
    if now - self._said < SAY_EVERY:
      return
    self._said = now
    parts = [f'{self._what}: {stage}', f'{done} of {total} {self._unit}']
    eta = eta_seconds(now - self._began, done - self._done_before, total - done)
    if eta is not None:
      parts.append(f'eta {format_duration(eta)}')
    say('  '.join(parts))


def interval_rates(
  seconds: float,
  tokens: np.ndarray,
  flops: np.ndarray,
  peak: float | None,
) -> dict[str, float]:
  """Rates of some consecutive steps that took `seconds` together.

  Args:
    tokens: of each step, (n,).
    flops: of each step, (n,); 0 where they are not known.
    peak: FLOP/s of all devices together; None: no MFU.
  """
  if not len(tokens) or seconds <= 0:
    return {}
  rates = {'step_s': seconds / len(tokens)}
  if tokens.any():
    rates['tokens_per_s'] = float(tokens.sum()) / seconds
  if flops.any() and peak:
    rates['mfu'] = float(flops.sum()) / seconds / peak
  return rates


def eta_seconds(seconds: float, done: float, left: float) -> float | None:
  """Time for the work left, at the speed of the work done."""
  return seconds * left / done if done > 0 else None


def format_metrics(
  metrics: Mapping[str, Any], rates: Mapping[str, float], eta: float | None
) -> str:
  parts = [
    f'{label} {float(metrics[key]):{spec}}'
    for key, label, spec in FIELDS
    if metrics.get(key) is not None
  ]
  if 'tokens_per_s' in rates:
    parts.append(f'{format_count(rates["tokens_per_s"])} tok/s')
  if 'mfu' in rates:
    parts.append(f'mfu {rates["mfu"]:.0%}')
  if eta is not None:
    parts.append(f'eta {format_duration(eta)}')
  return '  '.join(parts)


def format_count(value: float) -> str:
  """1234 -> '1.23k': three digits, as far as there are three."""
  if value != value:
    return 'nan'
  for size, suffix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 0.9995 * size:
      scaled = value / size
      digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
      return f'{scaled:.{digits}f}{suffix}'
  return f'{value:.0f}'


def format_duration(seconds: float) -> str:
  """72 -> '0:01:12'; from a day on '1d 02:03:04'."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  return f'{days}d {h:02}:{m:02}:{s:02}' if days else f'{h}:{m:02}:{s:02}'


def machine_peak(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
  """FLOP/s of all devices together, and what an MFU against it means.

  Several CPU devices of one process are the same cores, so a CPU counts once a
  process.
  """
  if devices[0].platform == 'cpu':
    processes = len({d.process_index for d in devices})
    return measure_matmul_flops() * processes, 'mfu of measured matmul peak'
  chip = chips.of_device(devices[0].device_kind)
  if chip is None:
    return None, f'no mfu: peak of {devices[0].device_kind} not known'
  return chip.flops * len(devices), 'mfu of dense bf16 peak'


@functools.cache  # once a process
def measure_matmul_flops(size: int = 1024, seconds: float = 0.3) -> float:
  """What a float32 matmul reaches on this CPU: the best of so many seconds.

  A few calls are too few: the first ones find cores that sleep, and then a
  step reaches more than this peak.
  """
  matmul = jax.jit(jnp.dot)
  x = jax.device_put(np.ones((size, size), np.float32), jax.devices('cpu')[0])
  matmul(x, x).block_until_ready()
  best, end = float('inf'), time.perf_counter() + seconds
  while (start := time.perf_counter()) < end:
    matmul(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


@contextlib.contextmanager
def tell_of_pauses(after: float = SAY_EVERY) -> Iterator[None]:
  """Says what is being done wherever nothing was said for `after` seconds.

  While it is the same kind of work it waits twice as long each time.
  """
  began = time.monotonic()

  def look(done: threading.Event) -> None:
    before, wait = '', after
    while not done.wait(after / 10):
      phase, since = watchdog.current()
      kind = re.sub(r'\d+', '', phase)
      if kind != before:
        before, wait = kind, after
      now = time.monotonic()
      if now - max(_last_line[0], began) > wait:
        clock = time.localtime(time.time() - (now - since))
        say(f'at work: {phase}, since {time.strftime("%H:%M:%S", clock)}')
        wait *= 2

  with watchdog.beside(look, 'pauses'):
    yield


def say(text: str) -> None:
  """Prints on process 0, at once, also to a log that knows no Unicode."""
  _last_line[0] = time.monotonic()
  if jax.process_index() != 0:
    return
  encoding = sys.stdout.encoding or 'utf-8'
  try:
    print(text.encode(encoding, 'replace').decode(encoding), flush=True)
  except OSError as e:
    if e.errno != errno.EIO:
      raise
    stopping.detach(sys.stdout)  # no terminal; its SIGHUP asks for a stop
