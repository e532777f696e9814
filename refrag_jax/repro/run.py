"""`--mode=repro`: the arms of an ablation, then a verdict for each claim.

An arm is the config with some values changed (`config.repro.arm`), and its run
an ordinary one in a workdir of its own, `<workdir>/seed<S>/<arm>`: resumable,
independent of the others but for the checkpoints that it starts from
(`init_from='@main/lm'`), and done when its results.json is. So arms can be
spread over days and machines, also into one workdir at once, where each run
holds the arm that it is at: copy their directories together and call this
again. What is judged are the records that lie there, whoever made them.
"""

import contextlib
import dataclasses
import graphlib
import os
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import jax

from refrag_jax import checkpoint, evaluate, lineage
from refrag_jax import run as training
from refrag_jax.config.schema import Config
from refrag_jax.errors import NonFinite, UserError
from refrag_jax.repro import report
from refrag_jax.repro import verdicts as claims
from refrag_jax.resolve import changed
from refrag_jax.runtime import environment, files
from refrag_jax.runtime import workdir as workdir_lib
from refrag_jax.runtime.progress import say
from refrag_jax.sharding import any_process


def run(config: Config, workdir: str) -> int:
  """Runs the arms that are asked for, judges all that there are.

  Raises:
    UserError: an arm cannot be run (said before the first one starts), or
      some failed; the others were run and the report is written.
    Stopped: asked to stop, the state of the arm in progress saved.
  """
  spec = read_claims(config.repro.claims)
  # A fault of the file shows before the runs and not behind them.
  claims.judge(spec, claims.Records(config.name, '', {}, ()))
  chosen = [
    (seed, arm, arm_config(config, arm, seed, workdir))
    for seed in config.repro.seeds
    for arm in in_order(config)
  ]
  failures = {}
  for seed, arm, cfg in chosen:
    say(f'-- arm {arm}, seed {seed}')
    folder = os.path.join(workdir, f'seed{seed}', arm)
    try:
      if _complete(cfg, folder):
        training.say_done(folder)
        continue
      with _held(folder):
        if _complete(cfg, folder):  # by another run, in between
          training.say_done(folder)
          continue
        save_config(config, arm, cfg, folder)
        train_sources_again(config, cfg, seed, workdir)
        training.run(cfg, folder)
    except (UserError, NonFinite) as e:
      failures[f'seed{seed}/{arm}'] = str(e)
      say(f'arm {arm}, seed {seed} failed: {e}')
    jax.clear_caches()  # each arm has programs of its own
  records = claims.load(workdir)
  verdicts = claims.judge(spec, records)
  report.write(workdir, spec, records, verdicts, failures)
  for verdict in verdicts:
    say(f'claim {verdict.number}: {verdict.verdict}')
  say(f'done: {workdir}/RESULTS.md, {workdir}/repro.html')
  if failures:
    raise UserError(
      f'{len(failures)} of {len(chosen)} arms failed ({", ".join(failures)}); '
      'each one says why above and in RESULTS.md; the same command runs only '
      'what is missing'
    )
  return 0


def train_sources_again(
  config: Config, cfg: Config, seed: int, workdir: str
) -> None:
  """Makes the checkpoints of other arms that an arm starts from, if missing.

  Records travel between machines and days, checkpoints often do not. Training
  is a function of config and seed, so a finished arm's stages come out the
  same again; its records stay as they are.

  Raises:
    UserError: such an arm was never trained to its end.
  """
  for name in cfg.stages:
    source = cfg.stage[name].init_from.removeprefix('@')
    other, _, stage = source.partition('/')
    folder = os.path.join(workdir, f'seed{seed}', other)
    if not stage or other not in config.repro.arm:
      continue
    there = checkpoint.latest_step(os.path.join(folder, 'checkpoints', stage))
    done = os.path.exists(os.path.join(folder, 'results.json'))
    # Another run may be at it, so that only one process looks.
    if _first(bool(there) and not done and not lineage.finished(folder, stage)):
      raise UserError(
        f'{other}/{stage}, which this arm starts from, is not trained to its '
        f'end: run arm {other} first'
      )
    if not _first(done and not there):
      continue
    say(f'{other}/{stage} has its record but no checkpoint: trained again')
    again = arm_config(config, other, seed, workdir)
    with _held(folder):
      train_sources_again(config, again, seed, workdir)
      chain = again.stages[: again.stages.index(stage) + 1]
      again = dataclasses.replace(again, stages=chain)
      training.run_stages(again, folder, lambda *_: None)


def _complete(cfg: Config, folder: str) -> bool:
  """Whether an arm has its results: records travel without checkpoints."""
  return _first(evaluate.is_complete(cfg, folder))


def _first(answer: bool) -> bool:
  """The first process's answer, on all of them."""
  return any_process(answer and jax.process_index() == 0)


@contextlib.contextmanager
def _held(folder: str) -> Iterator[None]:
  """An arm's workdir, held by the first process of a run for all of them.

  Raises:
    UserError: another run holds it, on every process.
  """
  with contextlib.ExitStack() as stack:
    problem = ''
    if jax.process_index() == 0:
      try:
        stack.enter_context(workdir_lib.held(folder))
      except UserError as e:
        problem = str(e)
      except OSError as e:
        problem = f'{folder} cannot be held: {e.strerror}'
    if any_process(bool(problem)):
      raise UserError(problem or f'{folder} is held by another run')
    yield


def in_order(config: Config) -> list[str]:
  """The chosen arms, each after those whose checkpoints it starts from.

  Raises:
    UserError: arms start from each other in a circle.
  """
  arms = config.repro.arm
  needs = {
    name: {
      source.removeprefix('@').split('/')[0]
      for change in arm.changes
      for source in [change.partition('init_from=')[2]]
      if source.startswith('@')
    }
    & arms.keys() - {name}
    for name, arm in arms.items()
  }
  chosen = config.repro.arms or tuple(arms)
  try:
    ordered = graphlib.TopologicalSorter(needs).static_order()
    return [name for name in ordered if name in chosen]
  except graphlib.CycleError as e:
    raise UserError(
      f'config.repro.arm: arms start from each other: {" -> ".join(e.args[1])}'
    ) from None


def read_claims(path: str) -> dict[str, Any]:
  """The claims and their tests, fixed before the runs.

  Raises:
    UserError: there is no such file, or it is no TOML.
  """
  if not path:
    raise UserError(
      'config.repro.claims names no file: --mode=repro needs a config with '
      'arms and claims, such as --config=configs/repro.py:smoke'
    )
  try:
    with open(path, 'rb') as f:
      return tomllib.load(f)
  except OSError as e:
    raise UserError(f'config.repro.claims={path}: {e.strerror}') from None
  except tomllib.TOMLDecodeError as e:
    raise UserError(f'config.repro.claims={path} is no TOML: {e}') from None


def save_config(config: Config, arm: str, cfg: Config, folder: str) -> None:
  """<folder>/config.json: what the arm is, and the line that made it."""
  files.write_json(
    os.path.join(folder, 'config.json'),
    {
      'config': dataclasses.asdict(cfg),
      'arm': arm,
      'changes': config.repro.arm[arm].changes,
      'command_line': ['python', '-m', 'refrag_jax.main', *sys.argv[1:]],
      'versions': environment.versions(),
      'git': environment.git_commit(),
    },
  )


def arm_config(config: Config, name: str, seed: int, workdir: str) -> Config:
  """The config of one arm: what running it by hand would take.

  Raises:
    UserError: a change that makes the arm cannot be made.
  """
  arm = config.repro.arm[name]
  cache = config.data.cache_dir or os.path.join(workdir, 'data')
  alone = dataclasses.replace(
    config,
    name=f'{config.name}_{name}',
    seed=seed,
    stages=arm.stages,
    evals=arm.evals or config.evals,
    data=dataclasses.replace(config.data, cache_dir=cache),  # one for all arms
    repro=dataclasses.replace(config.repro, arms=(), seeds=(), arm={}),
  )
  try:
    return changed(alone, arm.changes)
  except UserError as e:
    raise UserError(f'arm {name}: {e}') from None
