"""Where a stage starts, and whether what is there still holds.

A stage starts, in this order of preference, from its own newest checkpoint
(resume), from `init_from` where the config names one, or from its predecessor
in this workdir. Its record says with which settings; other settings are refused
and never mixed.
"""

import dataclasses
import hashlib
import json
import os
import re
from typing import Any

import jax

from refrag_jax import checkpoint, compilation
from refrag_jax.checksums import checksums
from refrag_jax.config.schema import Config, StageConfig
from refrag_jax.errors import UserError
from refrag_jax.heldout import Heldout
from refrag_jax.hf import sources
from refrag_jax.models.cepe import copy_self_attention
from refrag_jax.models.encoder import take_decoder_embeddings
from refrag_jax.models.projection import match_embedding_scale
from refrag_jax.runtime import files, watchdog
from refrag_jax.runtime.progress import say
from refrag_jax.session import (
  Session,
  abstract_params,
  base_decoder,
  base_models,
  checkpoint_beside,
  fresh_params,
  load_params,
  read_base_decoder,
  trained_groups,
)
from refrag_jax.sharding import path_str
from refrag_jax.stages import STAGES
from refrag_jax.stages.stage import Stage
from refrag_jax.state import TrainState

# Settings that may change where a stage goes on longer. `accumulation_steps`
# changes no number.
LONGER = ('num_train_steps', 'weights', 'accumulation_steps')


def start_state(
  session: Session, name: str, settings: dict, heldout: Heldout
) -> tuple[int, TrainState, dict[str, Any]]:
  """(first step, state, meta): resumed where there is something to resume."""
  stage, cfg = STAGES[name], session.config.stage[name]
  abstract = compilation.abstract_state(session, name)
  directory = session.checkpoint_dir(name)
  if checkpoint.latest_step(directory) is not None:
    meta = checkpoint.require(
      directory, session.identity, f'stage {name} resumes'
    )
    check_settings(meta['settings'], settings, name)
    base = meta.get('base_decoder')
    if base:
      params = {g: x for g, x in abstract.params.items() if g != 'decoder'}
      abstract = abstract.replace(params=params)
    start, state, meta = checkpoint.restore(directory, abstract)
    if base:
      decoder = read_base_decoder(session, base, f'stage {name} resumes')
      state = state.replace(params=state.params | {'decoder': decoder})
    if goes_on_longer(meta['settings'], settings):
      say(
        f'{name}  goes on from step {start} to {settings["num_train_steps"]}, '
        'with a learning rate that begins anew'
      )
      meta |= {
        'settings': settings,
        'schedules': [*meta.get('schedules', [0]), start],
      }
    if meta['format'] != checkpoint.FORMAT:  # its checksums were others
      meta['frozen'] = None
    say(f'{name}  resumes at step {start}')
    return start, state, meta
  source = init_from(session, name, check=False)
  params = initial_params(session, name)
  watchdog.phase(f'{name}, held-out loss before its first step')
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  state = jax.jit(
    lambda params: compilation.fresh_state(session, name, params),
    out_shardings=shardings,
  )(params)
  meta = {
    'stage': name,
    'settings': settings,
    'trained': sorted(groups_after(session, name, params)),
    'before_B': heldout.measure(state.params).tolist(),
    # Which documents may be called held out later: see evaluate.check_split.
    'heldout_fraction': session.config.data.heldout_fraction,
    'frozen': frozen_checksums(params, stage, cfg),
    'wall_s': 0.0,
    'compile_s': 0.0,
    'base': base_models(source),
    **session.identity,
  }
  trained, _ = stage.partition(params, cfg.freeze)
  if 'lora' in params and source and not jax.tree.leaves(trained['decoder']):
    meta['base_decoder'] = base_decoder(session, source, state.params)
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
  now, _ = STAGES[name].partition(params, session.config.stage[name].freeze)
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


def init_from_config(config: Config, name: str) -> str:
  """The starting point that the config names for a stage; '' if it does not."""
  first = config.init_from if name == config.stages[0] else ''
  return config.stage[name].init_from or first


def check_order(config: Config, workdir: str) -> None:
  """Refuses a stage without its predecessor, before any text is read."""
  for i, name in enumerate(config.stages):
    before = STAGES[name].predecessor
    if before is None or init_from_config(config, name):
      continue
    if before not in config.stages[:i] and not finished(workdir, before):
      raise no_predecessor(name, workdir)


def finished(workdir: str, name: str) -> dict[str, Any] | None:
  """A stage's record, where the checkpoint of its last step is there too."""
  path = os.path.join(workdir, 'stages', f'{name}.json')
  if not os.path.exists(path):
    return None
  record = files.read_json(path)
  newest = checkpoint.latest_step(os.path.join(workdir, 'checkpoints', name))
  return record if newest == record['steps'] else None


def no_predecessor(name: str, workdir: str) -> UserError:
  predecessor = STAGES[name].predecessor
  return UserError(
    f'stage {name} starts from a finished {predecessor}, and {workdir} has '
    f'none: put {predecessor} before it in config.stages, or name a checkpoint '
    f'with --config.stage.{name}.init_from=DIR'
  )


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
    'optimizer': dataclasses.asdict(config.optimizer),
    'lora_dropout': STAGES[name].lora_dropout(config),
  }
  return files.plain(settings | STAGES[name].task.settings(config))


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
  text = json.dumps(files.read_json(record)['settings'], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def changes(old: dict, new: dict) -> list[str]:
  """What settings differ in; an older record lacks what came in since."""
  return [
    f'{key} was {old[key]!r} and is {new[key]!r}'
    for key in new
    if key in old and old[key] != new[key] and key != 'accumulation_steps'
  ]


def check_settings(old: dict, new: dict, name: str) -> None:
  """Refuses to go on with what was trained with other settings.

  Raises:
    UserError: says what differs.
  """
  changed = changes(old, new)
  before = STAGES[name].predecessor
  starts = old.get('starts_from', ''), new.get('starts_from', '')
  digests = all(re.fullmatch('[0-9a-f]{16}', start) for start in starts)
  if before and digests and starts[0] != starts[1]:
    raise UserError(
      f'stage {name} was trained from another {before} than it would start '
      f'from now: {before} was trained again, or longer, after {name}, or the '
      f'config names another; take another --workdir, or delete what {name} '
      'and the stages after it have under checkpoints/ and stages/'
    )
  if changed and not goes_on_longer(old, new):
    raise UserError(
      f'stage {name} was trained here with other settings: '
      f'{"; ".join(changed[:3])}; take another --workdir, or delete what it '
      'and the stages after it have under checkpoints/ and stages/'
    )


def goes_on_longer(old: dict, new: dict) -> bool:
  """Whether settings differ in no more than what a stage may go on with.

  More steps, and another mixture of the same texts.
  """
  other = [
    key
    for key in new
    if key in old and old[key] != new[key] and key not in LONGER
  ]
  return not other and new['num_train_steps'] > old['num_train_steps']


def check_records(session: Session) -> None:
  """Refuses all that does not hold any more before the first step of any.

  What comes after a stage that is still to be trained is checked in its turn.

  Raises:
    UserError: a stage's record is of other settings.
  """
  untrained, longer = set(), set()
  for name in session.config.stages:
    path, before = session.record_path(name), STAGES[name].predecessor
    if os.path.exists(path) and before in longer:
      raise UserError(
        f'stage {before} would go on longer, and {name} was trained from what '
        f'it is now: take another --workdir, or delete what {name} and the '
        'stages after it have under checkpoints/ and stages/'
      )
    if before in untrained or not os.path.exists(path):
      untrained.add(name)
      continue
    record = files.read_json(path)
    settings = stage_settings(session, name)
    check_settings(record['settings'], settings, name)
    if goes_on_longer(record['settings'], settings):
      longer.add(name)


def frozen_checksums(
  params: dict, stage: Stage, cfg: StageConfig
) -> dict[str, int]:
  """Path: checksum of each parameter that a stage must not change."""
  _, frozen = stage.partition(params, cfg.freeze)
  return {
    path_str(path): int(x)
    for path, x in jax.tree_util.tree_leaves_with_path(checksums(frozen))
  }
