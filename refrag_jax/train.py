"""The one training loop, and the run that chains stages and evals.

A stage starts, in this order of preference, from its own newest checkpoint
(resume), from `init_from` where the config names one, or from its predecessor
in this workdir. Batch, key and variant of a step are pure functions of (seed,
stage, step), so a checkpoint holds no iterator.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import (
  checkpoint,
  evaluate,
  optimizer,
  programs,
  results,
  samples,
  sharding,
)
from refrag_jax import state as state_lib
from refrag_jax.checksums import checksums
from refrag_jax.config.check import asks_questions
from refrag_jax.config.schema import Config, context_chunks
from refrag_jax.data import curriculum, pipeline
from refrag_jax.data.questions import records as questions_lib
from refrag_jax.data.questions import retrieval
from refrag_jax.errors import NonFinite, Stopped, UserError
from refrag_jax.hf import sources
from refrag_jax.models.cepe import copy_self_attention
from refrag_jax.models.encoder import take_decoder_embeddings
from refrag_jax.models.projection import match_embedding_scale
from refrag_jax.report import run as report
from refrag_jax.runtime import watchdog
from refrag_jax.runtime.metrics import Writer, import_tensorboard
from refrag_jax.runtime.progress import Progress, machine_peak, say
from refrag_jax.runtime.stopping import stop_on_signal
from refrag_jax.session import (
  Session,
  abstract_params,
  base_models,
  checkpoint_beside,
  fresh_params,
  load_params,
  open_data,
  open_session,
  to_device,
  trained_groups,
)
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES, Stage
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state, map_pieces, row_keys

HELDOUT_ROWS = 256  # rows of the one fixed held-out batch of a stage
# What of config.data the batches of `sft` and its twins depend on, beside the
# questions themselves.
QUESTION_SETTINGS = (
  'question_template',
  'passage_template',
  'answer_template',
  'num_passages',
  'question_length',
  'passage_chunks',
  'answer_length',
  'heldout_fraction',
)


def run(config: Config, workdir: str) -> int:
  """`--mode=train`: the stages in order, then the evals, then the report."""
  if all_done(config, workdir):
    say_done(workdir)
    return 0
  run_stages(config, workdir, evaluate.write_results)
  if jax.process_index() == 0:
    report.write(workdir)
  say(f'done: {workdir}/results.json, {workdir}/report.html')
  return 0


def all_done(config: Config, workdir: str) -> bool:
  """Whether the same command would come to the same results.json.

  So what it was made of must still be there: the stages' records and
  checkpoints, and text, questions and models with the content that they had.
  """
  if not evaluate.is_complete(config, workdir):
    return False
  done = results.read_json(os.path.join(workdir, 'results.json'))
  records = {name: finished(workdir, name) for name in config.stages}
  if not all(records.values()) or not evaluate.is_of_stages(done, records):
    return False  # what is missing is said where it is trained again
  try:
    session = open_data(config, workdir)
    return evaluate.is_of_contents(done, session) and not any(
      changes(record['settings'], stage_settings(session, name))
      for name, record in records.items()
    )
  except UserError as e:  # results need no text any more
    say(f'not compared with what the run was made of: {e}')
    return True


def say_done(workdir: str) -> None:
  """Says where the results are, and writes the page if it is not there."""
  if not os.path.exists(os.path.join(workdir, 'report.html')):
    report.write(workdir)  # killed between the two
  say(f'all done: {workdir}/results.json, {workdir}/report.html')


def run_stages(
  config: Config, workdir: str, then: Callable[[Session, Any], None]
) -> None:
  """Trains the stages in order, then calls `then(session, stop)`."""
  check_order(config, workdir)
  check_extras(config)
  evaluate.check_sources(config)
  with watchdog.watch(config.cluster.hang_seconds):
    session = open_session(config, workdir)
  say(session.corpus.summary())
  for name in config.stages:
    pipeline.check_text(config, name, session.corpus)
  evaluate.check_windows(session)
  os.makedirs(workdir, exist_ok=True)
  draw_curriculum(session)
  peak, meaning = machine_peak(jax.devices())
  say(f'{jax.device_count()} x {jax.devices()[0].device_kind}; {meaning}')
  writer = Writer(workdir, config.tensorboard)
  with (
    jax.set_mesh(session.mesh),
    stop_on_signal() as stop,
    watchdog.watch(config.cluster.hang_seconds),
  ):
    try:
      for name in config.stages:
        train_stage(session, name, writer, stop, peak)
      then(session, stop)
      # After the last step too: with --mode=repro another arm would follow.
      if any(sharding.Vote(session.mesh).now(stop.is_set())):
        raise Stopped('stopped at the end of a run; the same command goes on')
    finally:
      writer.close()


def draw_curriculum(session: Session) -> None:
  """The mixture of chunk counts (Table 8, Figure 6), for the report."""
  config = session.config
  for name in config.stages:
    if config.stage[name].factors:
      k = config.model.chunk_size
      curriculum.plot(
        config.stage[name].num_train_steps,
        context_chunks(config.stage[name], k),
        k,
        os.path.join(session.workdir, 'curriculum.svg'),
      )
      return


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
    record = results.read_json(session.record_path(name))
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
  compiled = programs.compile_stage(session, name, state, start, heed_stop)
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
  pending = after_B = None
  saved = start or None
  saved_at = training_since = time.monotonic()
  with progress, contextlib.closing(manager):
    for step, batch in pipeline.train_batches(
        config, name, session.corpus, start, rows
    ):  # fmt: skip
      watchdog.phase(f'{name}, step {step + 1} and the batch after it')
      rate = optimizer.learning_rate(
        step, cfg.num_train_steps, cfg.peak_learning_rate
      )
      state, metrics = compiled.of_step(step)(
        state,
        to_device(batch, session.mesh),
        programs.step_key(session, name, step),
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
  results.write_json(session.record_path(name), record | {'settings': settings})


class Heldout(NamedTuple):
  """A stage's one fixed held-out batch and its measure on it."""

  batch: dict[str, np.ndarray]
  measure: Callable[[dict], np.ndarray]  # params -> float32 (B,)


def fixed_heldout(session: Session, name: str) -> Heldout:
  """The batch that a stage is measured on before, during and after.

  Where its steps come in variants, the measure is the mean over them. It runs
  in pieces of as many rows as a step holds at once, so that it needs no more
  memory than the step does.
  """
  cfg, stage = session.config.stage[name], STAGES[name]
  batch = pipeline.heldout_batch(
    session.config, name, session.corpus, HELDOUT_ROWS
  )
  ways = sharding.axis_size('batch', session.mesh)
  rows = len(batch['doc_B']) // ways * ways
  if not rows:
    raise UserError(
      f'stage {name}: the held-out documents give {len(batch["doc_B"])} rows, '
      f'fewer than the {ways} devices; raise data.heldout_fraction'
    )
  batch = {key: value[:rows] for key, value in batch.items()}
  size = min(cfg.batch_size // cfg.accumulation_steps, rows)  # of a piece
  number = -(-rows // size)
  # The last piece is filled up, and what is too much is cut off again.
  index = np.minimum(np.arange(number * size), rows - 1).reshape(number, size)
  chunks = batch['chunks_BCK'].shape[1] if 'chunks_BCK' in batch else 0
  variants = stage.variants(cfg, chunks)

  @jax.jit
  def measure(params, pieces):
    def of_piece(args):
      return sum(
        stage.evaluate(session.model, params, *args, variant, cfg)
        for variant in variants
      ) / len(variants)

    keys_B = row_keys(jax.random.key(session.config.seed), rows)
    return map_pieces(of_piece, (pieces, keys_B[index])).reshape(-1)

  pieces = sharding.replicate(
    {field: values[index] for field, values in batch.items()}, session.mesh
  )
  return Heldout(
    batch, lambda params: sharding.fetch(measure(params, pieces))[:rows]
  )


def start_state(
  session: Session, name: str, settings: dict, heldout: Heldout
) -> tuple[int, TrainState, dict[str, Any]]:
  """(first step, state, meta): resumed where there is something to resume."""
  stage = STAGES[name]
  abstract = programs.abstract_state(session, name)
  directory = session.checkpoint_dir(name)
  if checkpoint.latest_step(directory) is not None:
    meta = checkpoint.require(
      directory, session.identity, f'stage {name} resumes'
    )
    check_settings(meta['settings'], settings, name)
    start, state, meta = checkpoint.restore(directory, abstract)
    if meta['format'] != checkpoint.FORMAT:  # its checksums were others
      meta['frozen'] = None
    say(f'{name}  resumes at step {start}')
    return start, state, meta
  params = initial_params(session, name)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  state = jax.jit(
    lambda params: TrainState(
      np.int32(0), params, init_opt_state(params, stage)
    ),
    out_shardings=shardings,
  )(params)
  meta = {
    'stage': name,
    'settings': settings,
    'trained': sorted(groups_after(session, name, params)),
    'before_B': heldout.measure(state.params).tolist(),
    # Which documents may be called held out later: see evaluate.check_split.
    'heldout_fraction': session.config.data.heldout_fraction,
    'frozen': frozen_checksums(params, stage),
    'wall_s': 0.0,
    'compile_s': 0.0,
    'base': base_models(init_from(session, name, check=False)),
    **session.identity,
  }
  return 0, state, meta


def initial_params(session: Session, name: str) -> dict:
  """The parameters a stage starts from: deterministic, so also re-derivable.

  Raises:
    UserError: says which stage has to be run first.
  """
  source = init_from(session, name)
  if source is None:
    return fresh_params(session, abstract_params(session))
  params, groups = load_params(
    session, source, f'stage {name} starts from {source}'
  )
  if 'projection' not in groups:  # a fresh projection meets this decoder
    params = jax.jit(match_embedding_scale)(params)
  if 'cross' in params and 'cross' not in groups:  # likewise
    params = jax.jit(copy_self_attention)(params)
  if session.config.stage[name].encoder_init:
    if 'encoder' in groups:
      raise UserError(
        f'stage {name}: encoder_init is for a fresh encoder, and the one in '
        f"{source} is trained: set config.stage.{name}.encoder_init to ''"
      )
    params = jax.jit(take_decoder_embeddings)(params)
  return params


def groups_after(session: Session, name: str, params: dict) -> set[str]:
  """The parameter groups that a stage or those before it train."""
  source = init_from(session, name)
  before = trained_groups(session, source, f'stage {name}') if source else []
  now, _ = state_lib.partition(params, STAGES[name].trainable)
  return {*before, *(group for group in now if jax.tree.leaves(now[group]))}


def init_from(session: Session, name: str, check: bool = True) -> str | None:
  """The checkpoint directory that a stage starts from; None for scratch."""
  predecessor = STAGES[name].predecessor
  explicit = init_from_config(session.config, name)
  if explicit.startswith('@'):
    return checkpoint_beside(session.workdir, explicit)
  if explicit or predecessor is None:
    return explicit or None
  if check and not finished(session.workdir, predecessor):
    raise no_predecessor(name, session.workdir)
  return session.checkpoint_dir(predecessor)


def check_order(config: Config, workdir: str) -> None:
  """Refuses a stage without its predecessor, before any text is read."""
  for i, name in enumerate(config.stages):
    before = STAGES[name].predecessor
    if before is None or init_from_config(config, name):
      continue
    if before not in config.stages[:i] and not finished(workdir, before):
      raise no_predecessor(name, workdir)


def check_extras(config: Config) -> None:
  """Refuses what a package is missing for that not everybody installs."""
  if config.tensorboard:
    import_tensorboard()
  if asks_questions(config):
    retrieval.require()


def finished(workdir: str, name: str) -> dict[str, Any] | None:
  """A stage's record, where the checkpoint of its last step is there too."""
  path = os.path.join(workdir, 'stages', f'{name}.json')
  if not os.path.exists(path):
    return None
  record = results.read_json(path)
  newest = checkpoint.latest_step(os.path.join(workdir, 'checkpoints', name))
  return record if newest == record['steps'] else None


def no_predecessor(name: str, workdir: str) -> UserError:
  predecessor = STAGES[name].predecessor
  return UserError(
    f'stage {name} starts from a finished {predecessor}, and {workdir} has '
    f'none: put {predecessor} before it in config.stages, or name a checkpoint '
    f'with --config.stage.{name}.init_from=DIR'
  )


def init_from_config(config: Config, name: str) -> str:
  """The starting point that the config names for a stage; '' if it does not."""
  first = config.init_from if name == config.stages[0] else ''
  return config.stage[name].init_from or first


def stage_settings(session: Session, name: str) -> dict[str, Any]:
  """What must not change under a stage that is resumed or kept."""
  config = session.config
  settings = dataclasses.asdict(config.stage[name])
  del settings['init_from']  # `starts_from` says it, wherever the files lie
  settings |= {
    'seed': config.seed,
    'corpus': session.corpus.hash,
    'weights': config.data.weights,
    'starts_from': origin(session, name),
  }
  if name != 'lm':
    settings['max_encoder_tokens'] = config.data.max_encoder_tokens
  if name.startswith('sft'):
    settings |= {key: getattr(config.data, key) for key in QUESTION_SETTINGS}
    settings['questions_content'] = questions_lib.fingerprint(config)
  return results.plain(settings)


def origin(session: Session, name: str) -> str:
  """What a stage started from: a path, or a digest of its predecessor.

  Settings hold their own predecessor's digest, so a stage that is trained
  anew with other settings is noticed by everything after it.
  """
  source = init_from(session, name, check=False)
  if source is None:
    return 'scratch'
  if sources.is_source(source):
    return sources.fingerprint(sources.locate(source))
  # <workdir>/checkpoints/<stage> has its record in <workdir>/stages.
  folder, stage = os.path.split(os.path.abspath(source))
  record = os.path.join(os.path.dirname(folder), 'stages', f'{stage}.json')
  if not os.path.exists(record):
    return source if init_from_config(session.config, name) else ''
  text = json.dumps(results.read_json(record)['settings'], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def changes(old: dict, new: dict) -> list[str]:
  """What settings differ in; an older record lacks what came in since."""
  return [
    f'{key} was {old[key]!r} and is {new[key]!r}'
    for key in new
    if key in old and old[key] != new[key] and key != 'accumulation_steps'
  ]


def check_settings(old: dict, new: dict, name: str) -> None:
  changed = changes(old, new)
  if changed:
    raise UserError(
      f'stage {name} was trained here with other settings: '
      f'{"; ".join(changed[:3])}; take another --workdir, or delete what it '
      'and the stages after it have under checkpoints/ and stages/'
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
  session: Session, name: str, meta: dict, params, after_B, heldout: Heldout
) -> dict[str, Any]:
  """The stage's entry in results.json (design.md section 4)."""
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


def frozen_checksums(params: dict, stage: Stage) -> dict[str, int]:
  """Path: checksum of each parameter that a stage must not change."""
  _, frozen = state_lib.partition(params, stage.trainable)
  return {
    path_str(path): int(x)
    for path, x in jax.tree_util.tree_leaves_with_path(checksums(frozen))
  }


def chunks_cut(batch: dict[str, np.ndarray]) -> tuple[int, int]:
  """How many chunks exceed the encoder's cap, and how many there are."""
  if 'encoder_cut_B' not in batch:
    return 0, 0
  return int(batch['encoder_cut_B'].sum()), int(
    (batch['chunk_len_BC'] > 0).sum()
  )


def _due(done: int, every: int) -> bool:
  return every > 0 and done % every == 0
