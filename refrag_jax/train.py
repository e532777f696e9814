"""The one training loop.

Batch, key and variant of a step are pure functions of (seed, stage, step), so a
checkpoint holds no iterator: a stage that is resumed at step n asks for step n.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refrag_jax import (
  checkpoint,
  compilation,
  optimizer,
  results,
  samples,
  sharding,
)
from refrag_jax import state as state_lib
from refrag_jax.data import pipeline
from refrag_jax.errors import NonFinite, Stopped
from refrag_jax.heldout import Heldout, chunks_cut, fixed_heldout
from refrag_jax.lineage import (
  check_settings,
  finished,
  frozen_checksums,
  goes_on_longer,
  stage_settings,
  start_state,
)
from refrag_jax.runtime import files, watchdog
from refrag_jax.runtime.metrics import Writer
from refrag_jax.runtime.profile import Trace
from refrag_jax.runtime.progress import Progress, say
from refrag_jax.session import Session, to_device
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState

SILENT_S = 30.0  # after which a line is shown, whatever log_every_steps says


class Ready(NamedTuple):
  """A stage before its first step."""

  start: int  # steps that are done
  state: TrainState
  meta: dict[str, Any]  # of its checkpoints
  heldout: Heldout
  programs: compilation.Programs


def train_stage(
  session: Session,
  name: str,
  writer: Writer,
  stop: threading.Event,
  peak: float | None,
  heard: Callable[[str, float], None] = lambda name, stage_s: None,
) -> None:
  """Trains one stage from wherever it stands to its end, or to `stop`.

  Args:
    heard: told at every log line what all steps of the stage will take, in
      seconds, if they go on as since the last one.

  Raises:
    UserError: its predecessor's or its own checkpoint is missing or
      incompatible.
    NonFinite: loss or gradient overflowed; the state before it is on disk.
    Stopped: asked to stop, state saved.
  """
  settings = stage_settings(session, name)
  if os.path.exists(session.record_path(name)):
    record = files.read_json(session.record_path(name))
    check_settings(record['settings'], settings, name)
    longer = goes_on_longer(record['settings'], settings)
    if finished(session.workdir, name) and not longer:
      say(f'{name}  done before')
      return
    if not longer:
      say(f'{name}  has its record but no checkpoint: trained again')
  clock = time.monotonic()
  ready = prepare(session, name, settings, writer, stop)
  before_s = ready.meta['wall_s'] - clock  # of earlier runs
  state, after_B, tokens_per_s = steps(
    session, name, ready, writer, stop, peak, heard, before_s
  )
  ready.meta['wall_s'] = before_s + time.monotonic()
  record = stage_record(session, name, ready, state.params, after_B)
  record['tokens_per_s'] = tokens_per_s
  files.write_json(session.record_path(name), record | {'settings': settings})
  say(f'{name}  {outcome(record)}')


def prepare(
  session: Session,
  name: str,
  settings: dict[str, Any],
  writer: Writer,
  stop: threading.Event,
) -> Ready:
  """Where the stage starts, its measure there, and its compiled steps."""
  vote = sharding.Vote(session.mesh)

  def heed_stop():
    if any(vote.now(stop.is_set())):
      raise Stopped(
        f'stopped in stage {name} before its first step; run the same command '
        'to continue'
      )

  watchdog.phase(f'{name}, start')
  heed_stop()
  heldout = fixed_heldout(session, name)
  start, state, meta = start_state(session, name, settings, heldout)
  heed_stop()
  writer.truncate_from(name, start + 1 if start else 0)
  if not start:
    before = {STAGES[name].measures: np.mean(meta['before_B'])}
    writer.scalars(name, 0, 'heldout', before)
  watchdog.phase(f'{name}, compilation')
  programs = compilation.compile_stage(session, name, state, start, heed_stop)
  heed_stop()
  say(f'{name}  compiled in {programs.compile_s:.1f} s')
  meta = meta | {'compile_s': meta['compile_s'] + programs.compile_s}
  cut, chunks = chunks_cut(heldout.batch)
  if cut:
    most = session.config.data.max_encoder_tokens
    say(
      f'{name}  {cut:,} of {chunks:,} held-out chunks have more encoder tokens '
      f'than data.max_encoder_tokens={most}: of them the encoder reads the '
      'beginning'
    )
  return Ready(start, state, meta, heldout, programs)


def steps(
  session: Session,
  name: str,
  ready: Ready,
  writer: Writer,
  stop: threading.Event,
  peak: float | None,
  heard: Callable[[str, float], None],
  before_s: float,
) -> tuple[TrainState, np.ndarray, float]:
  """The loop over a stage's steps.

  Args:
    before_s: what the clock is short of the stage's whole time.

  Returns:
    The last state, the held-out measure there (B,), and text tokens a second.
  """
  config, cfg, stage = session.config, session.config.stage[name], STAGES[name]
  start, state, meta, heldout, programs = ready
  sign = -1.0 if stage.measures == 'reward' else 1.0
  first = meta.get('schedules', [0])[-1]  # the schedule's first step
  progress = Progress(
      name, cfg.num_train_steps, start,
      programs.tokens_of_step, programs.flops_of_step, peak,
  )  # fmt: skip
  vote = sharding.Vote(session.mesh)
  rows = sharding.local_rows(session.mesh, cfg.batch_size)
  sample = stage.sampler(config, session.corpus)
  pending = after_B = None
  saved, logged = start or None, start
  work = programs.flops_of_step
  manager = checkpoint.open_manager(
    session.checkpoint_dir(name), config.checkpoints_to_keep
  )
  trace = Trace(session.workdir, name, config.profile_steps, progress.excluded)
  saved_at = training_since = time.monotonic()
  with progress, contextlib.closing(manager), contextlib.closing(trace):
    for step, batch in pipeline.batches(
      sample, rows, start, cfg.num_train_steps
    ):
      watchdog.phase(f'{name}, step {step + 1} and the batch after it')
      rate = optimizer.learning_rate(
        step - first,
        cfg.num_train_steps - first,
        cfg.peak_learning_rate,
        config.optimizer,
      )
      with trace.step(step + 1):
        state, metrics = programs.of_step(step)(
          state,
          to_device(batch, session.mesh),
          compilation.step_key(session, name, step),
          np.float32(rate),
        )
      # A save that failed meanwhile ends the run here, not at the next save.
      checkpoint.check_saved(manager)
      trace.after(step + 1, metrics)
      # Read one step late, so that the device always has its next step.
      check_finite(pending, name, saved)
      pending = (step, batch, metrics)
      done = step + 1
      last = done == cfg.num_train_steps
      overdue = time.monotonic() - saved_at > config.checkpoint_every_seconds
      asked, late, silent = vote(
        stop.is_set(), overdue, progress.silent_s() > SILENT_S
      )
      # Else that was asked before the save, or the line, just made.
      late &= saved != step
      silent &= logged != step
      evals = _due(done, config.eval_every_steps)
      saves = last or asked or _due(done, config.checkpoint_every_steps)
      logs = last or asked or _due(done, config.log_every_steps)
      if logs or silent:
        check_finite(pending, name, saved)
        shown = shown_metrics(metrics, batch) | {'learning_rate': rate}
        rates = progress.log(done, shown)
        if logs:
          writer.scalars(name, done, 'train', shown | rates)
        if 'step_s' in rates and work.any():
          heard(name, rates['step_s'] * work.sum() / work[logged:done].mean())
        logged = done
      if saves or evals or late:
        check_finite(pending, name, saved)
        watchdog.phase(f'{name}, held-out loss at step {done}')
        with progress.excluded('eval'):
          after_B = heldout.measure(state.params)
        value = {stage.measures: np.mean(after_B)}
        writer.scalars(name, done, 'heldout', value)
      # Before the checkpoint: a run resumed from it does not duplicate them.
      every = config.sample_every_steps
      if _due(done, every) or (last and every >= 0):
        watchdog.phase(f'{name}, samples at step {done}')
        with progress.excluded('samples'):
          texts = samples.rows(session, name, state.params, heldout.batch)
        writer.samples(name, done, texts)
      if saves or late:
        meta['wall_s'] = before_s + time.monotonic()
        watchdog.phase(f'{name}, checkpoint at step {done}')
        with progress.excluded('checkpoint'):
          checkpoint.save(manager, done, state, meta, sign * np.mean(after_B))
        saved, saved_at = done, time.monotonic()
      if asked and not last:
        manager.wait_until_finished()
        raise Stopped(
          f'stopped in stage {name} at step {done}, state saved; run the '
          'same command to continue'
        )
    manager.wait_until_finished()
  if after_B is None:  # killed between its last checkpoint and its record
    watchdog.phase(f'{name}, held-out loss at its end')
    after_B = heldout.measure(state.params)
  trained_s = time.monotonic() - training_since
  trained_s -= sum(progress.excluded_s.values())
  tokens = programs.tokens_of_step[start:].sum()
  return state, after_B, float(tokens / max(trained_s, 1e-9))


def shown_metrics(metrics: dict, batch: dict) -> dict[str, Any]:
  """A step's metrics as numbers and NumPy arrays."""
  shown = {key: sharding.fetch(value) for key, value in metrics.items()}
  shown = {key: x.item() if x.ndim == 0 else x for key, x in shown.items()}
  cut, chunks = chunks_cut(batch)
  if cut:
    shown['encoder_cut'] = cut / chunks
  return shown


def outcome(record: dict[str, Any]) -> str:
  """The held-out measure before and after a stage, in words."""
  before, after, gain = (
    record[key] for key in ('heldout_before', 'heldout_after', 'paired_gain')
  )
  se = 'no se' if gain['se'] is None else f'± {gain["se"]:.3f}'
  return (
    f'held-out {record["measures"]} {before["mean"]:.3f} before, '
    f'{after["mean"]:.3f} after: a gain of {gain["mean"]:+.3f} {se} '
    f'(n = {gain["n"]} documents)'
  )


def check_finite(pending, name: str, saved: int | None) -> None:
  """Stops the run at a non-finite step; the step itself kept the old state."""
  if pending is None:
    return
  step, batch, metrics = pending
  if not bool(metrics['finite']):
    rows = batch.get('id_B', batch['doc_B']).tolist()
    raise NonFinite(
      f'stage {name}: loss {float(metrics["loss"])}, gradient norm '
      f'{float(metrics["grad_norm"])} at step {step + 1}; parameters were not '
      f'touched; batch ids {rows}; last good checkpoint: '
      f'{"none" if saved is None else f"step {saved}"}'
    )


def stage_record(
  session: Session, name: str, ready: Ready, params, after_B
) -> dict[str, Any]:
  """The stage's entry in results.json."""
  stage, meta, heldout = STAGES[name], ready.meta, ready.heldout
  docs = heldout.batch['doc_B']
  before_N = results.by_document(np.array(meta['before_B']), docs)
  after_N = results.by_document(after_B, docs)
  reward = stage.measures == 'reward'
  gain = (after_N, before_N) if reward else (before_N, after_N)
  cfg = session.config.stage[name]
  trained, frozen = stage.partition(params, cfg.freeze)
  return {
    'steps': session.config.stage[name].num_train_steps,
    **({'schedules': meta['schedules']} if 'schedules' in meta else {}),
    'measures': stage.measures,
    'heldout_before': results.stat(before_N),
    'heldout_after': results.stat(after_N),
    'paired_gain': results.paired(*gain),
    'wall_s': meta['wall_s'],
    'compile_s': meta['compile_s'],
    'trainable_params': state_lib.count(trained),
    'frozen_params': state_lib.count(frozen),
    # None: not known, where an older version began the stage.
    'frozen_unchanged': None
    if meta['frozen'] is None
    else frozen_checksums(params, stage, cfg) == meta['frozen'],
    **dict(zip(('encoder_cut', 'chunks'), chunks_cut(heldout.batch))),
  }


def _due(done: int, every: int) -> bool:
  return every > 0 and done % every == 0
