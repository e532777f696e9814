"""The one training loop.

Batch, key and variant of a step are pure functions of (seed, stage, step), so a
checkpoint holds no iterator: a stage that is resumed at step n asks for step n.
"""

import contextlib
import os
import threading
import time
from typing import Any

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
  stage_settings,
  start_state,
)
from refrag_jax.runtime import files, watchdog
from refrag_jax.runtime.metrics import Writer
from refrag_jax.runtime.progress import Progress, say
from refrag_jax.session import (
  Session,
  to_device,
)
from refrag_jax.stages import STAGES


def train_stage(
  session: Session,
  name: str,
  writer: Writer,
  stop: threading.Event,
  peak: float | None,
) -> None:
  """Trains one stage from wherever it stands to its end, or to `stop`.

  Raises:
    UserError: its predecessor's or its own checkpoint is missing or
      incompatible.
    NonFinite: loss or gradient overflowed; the state before it is on disk.
    Stopped: asked to stop, state saved.
  """
  config, cfg, stage = session.config, session.config.stage[name], STAGES[name]
  settings = stage_settings(session, name)
  if os.path.exists(session.record_path(name)):
    record = files.read_json(session.record_path(name))
    check_settings(record['settings'], settings, name)
    if finished(session.workdir, name):
      say(f'{name}  done before')
      return
    say(f'{name}  has its record but no checkpoint: trained again')

  watchdog.phase(f'{name}, start')
  clock = time.monotonic()
  vote = sharding.Vote(session.mesh)

  def heed_stop():
    if any(vote.now(stop.is_set())):
      raise Stopped(
        f'stopped in stage {name} before its first step; run the same command '
        'to continue'
      )

  heed_stop()
  heldout = fixed_heldout(session, name)
  start, state, meta = start_state(session, name, settings, heldout)
  manager = checkpoint.open_manager(session.checkpoint_dir(name))
  heed_stop()
  writer.truncate_from(name, start + 1 if start else 0)
  if not start:
    before = {stage.measures: np.mean(meta['before_B'])}
    writer.scalars(name, 0, 'heldout', before)
  watchdog.phase(f'{name}, compilation')
  compiled = compilation.compile_stage(session, name, state, start, heed_stop)
  heed_stop()
  say(f'{name}  compiled {len(compiled.compiled)} step programs in '
      f'{compiled.compile_s:.1f} s')  # fmt: skip
  meta = meta | {'compile_s': meta['compile_s'] + compiled.compile_s}
  wall_before = meta['wall_s']
  sign = -1.0 if stage.measures == 'reward' else 1.0
  cut, chunks = chunks_cut(heldout.batch)
  if cut:
    say(
      f'{name}  {cut:,} of {chunks:,} held-out chunks have more encoder tokens '
      f'than data.max_encoder_tokens={config.data.max_encoder_tokens}: of them '
      'the encoder reads the beginning'
    )

  progress = Progress(
      name, cfg.num_train_steps, start,
      compiled.tokens_of_step, compiled.flops_of_step, peak,
  )  # fmt: skip
  vote = sharding.Vote(session.mesh)  # a new one: with other questions
  rows = sharding.local_rows(session.mesh, cfg.batch_size)
  sample = stage.sampler(config, session.corpus)
  pending = after_B = None
  saved = start or None
  saved_at = training_since = time.monotonic()
  with progress, contextlib.closing(manager):
    for step, batch in pipeline.batches(
      sample, rows, start, cfg.num_train_steps
    ):
      watchdog.phase(f'{name}, step {step + 1} and the batch after it')
      rate = optimizer.learning_rate(
        step, cfg.num_train_steps, cfg.peak_learning_rate
      )
      state, metrics = compiled.of_step(step)(
        state,
        to_device(batch, session.mesh),
        compilation.step_key(session, name, step),
        np.float32(rate),
      )
      # A save that failed meanwhile ends the run here, not at the next save.
      checkpoint.check_saved(manager)
      # Read one step late, so that the device always has its next step.
      check_finite(pending, name, saved)
      pending = (step, batch, metrics)
      done = step + 1
      last = done == cfg.num_train_steps
      overdue = time.monotonic() - saved_at > config.checkpoint_every_seconds
      asked, late = vote(stop.is_set(), overdue)
      late &= saved != step  # else that was asked before the save just made
      evals = _due(done, config.eval_every_steps)
      saves = last or asked or _due(done, config.checkpoint_every_steps)
      if last or asked or _due(done, config.log_every_steps):
        check_finite(pending, name, saved)
        shown = {k: sharding.fetch(value) for k, value in metrics.items()}
        shown = {
          key: x.item() if x.ndim == 0 else x for key, x in shown.items()
        }
        shown['learning_rate'] = rate
        cut, chunks = chunks_cut(batch)
        if cut:
          shown['encoder_cut'] = cut / chunks
        writer.scalars(name, done, 'train', shown | progress.log(done, shown))
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
        meta['wall_s'] = wall_before + time.monotonic() - clock
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
    after_B = heldout.measure(state.params)
  trained_s = time.monotonic() - training_since
  trained_s -= sum(progress.excluded_s.values())
  meta['wall_s'] = wall_before + time.monotonic() - clock
  record = stage_record(session, name, meta, state.params, after_B, heldout)
  tokens = compiled.tokens_of_step[start:].sum()
  record['tokens_per_s'] = float(tokens / max(trained_s, 1e-9))
  files.write_json(session.record_path(name), record | {'settings': settings})


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
  session: Session, name: str, meta: dict, params, after_B, heldout: Heldout
) -> dict[str, Any]:
  """The stage's entry in results.json."""
  stage = STAGES[name]
  docs = heldout.batch['doc_B']
  before_N = results.by_document(np.array(meta['before_B']), docs)
  after_N = results.by_document(after_B, docs)
  reward = stage.measures == 'reward'
  gain = (after_N, before_N) if reward else (before_N, after_N)
  trained, frozen = state_lib.partition(params, stage.trainable)
  return {
    'steps': session.config.stage[name].num_train_steps,
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
    else frozen_checksums(params, stage) == meta['frozen'],
    **dict(zip(('encoder_cut', 'chunks'), chunks_cut(heldout.batch))),
  }


def _due(done: int, every: int) -> bool:
  return every > 0 and done % every == 0
