"""A training run: the stages in order, then the evals, then the report."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from refrag_jax import evaluate, forecast, sharding
from refrag_jax.config.schema import Config, context_chunks
from refrag_jax.data import curriculum
from refrag_jax.data.questions import retrieval
from refrag_jax.errors import Stopped, UserError
from refrag_jax.evals import EVALS, asks_questions
from refrag_jax.lineage import (
  changes,
  check_order,
  check_records,
  finished,
  stage_settings,
)
from refrag_jax.report import run as report
from refrag_jax.runtime import files, wandb, watchdog
from refrag_jax.runtime.metrics import Writer, import_tensorboard
from refrag_jax.runtime.progress import machine_peak, say, tell_of_pauses
from refrag_jax.runtime.stopping import stop_on_signal
from refrag_jax.session import Session, open_data, open_session
from refrag_jax.stages import STAGES
from refrag_jax.train import train_stage


def run(config: Config, workdir: str) -> int:
  """`--mode=train`: the stages in order, then the evals, then the report."""
  if all_done(config, workdir):
    say_done(workdir)
    return 0
  run_stages(config, workdir, evaluate.write_results)
  if jax.process_index() == 0:
    report.write(workdir, EVALS)
    for line in report.told(workdir):
      say(line)
  say(f'done: {workdir}/results.json, {workdir}/report.html')
  return 0


def all_done(config: Config, workdir: str) -> bool:
  """Whether the same command would come to the same results.json.

  So what it was made of must still be there: the stages' records and
  checkpoints, and text, questions and models with the content that they had.
  """
  if not evaluate.is_complete(config, workdir):
    return False
  done = files.read_json(os.path.join(workdir, 'results.json'))
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
    report.write(workdir, EVALS)  # killed between the two
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
    STAGES[name].task.check_text(config, name, session.corpus)
  evaluate.check_windows(session)
  check_records(session)
  os.makedirs(workdir, exist_ok=True)
  draw_curriculum(session)
  peak, meaning = machine_peak(jax.devices())
  say(f'{jax.device_count()} x {jax.devices()[0].device_kind}; {meaning}')
  heard = forecast.tell(session)
  values = dataclasses.asdict(config)
  writer = Writer(workdir, config.tensorboard, config.wandb, values)
  with (
    jax.set_mesh(session.mesh),
    stop_on_signal() as stop,
    watchdog.watch(config.cluster.hang_seconds),
    tell_of_pauses(),
  ):
    try:
      for name in config.stages:
        train_stage(session, name, writer, stop, peak, heard)
      then(session, stop)
      # After the last step too: with --mode=repro another arm would follow.
      if any(sharding.Vote(session.mesh).now(stop.is_set())):
        raise Stopped('stopped at the end of a run; the same command goes on')
    finally:
      writer.close()


def check_extras(config: Config) -> None:
  """Refuses what a package is missing for that not everybody installs."""
  if config.tensorboard:
    import_tensorboard()
  if config.wandb:
    wandb.require()
  if asks_questions(config):
    retrieval.require()


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
