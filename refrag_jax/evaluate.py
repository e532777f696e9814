"""Evals over checkpoints: at the end of a run, or on any devices later.

Which weights answer for which rows is in evals/common.py.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from refrag_jax import checkpoint
from refrag_jax.config.schema import Config
from refrag_jax.data import tokenizers
from refrag_jax.data import windows as windows_lib
from refrag_jax.data.questions import records as questions_lib
from refrag_jax.data.text import corpus as corpus_lib
from refrag_jax.data.text import sources as text_lib
from refrag_jax.errors import UserError
from refrag_jax.evals import EVALS, qa, question_files, selection
from refrag_jax.evals.common import HELDOUT, ROLES, Context
from refrag_jax.hf import sources
from refrag_jax.report import run as report
from refrag_jax.runtime import environment, files, watchdog
from refrag_jax.runtime.progress import say, tell_of_pauses
from refrag_jax.runtime.stopping import stop_on_signal
from refrag_jax.session import (
  Session,
  checkpoint_beside,
  load_params,
  open_session,
  trained_groups,
)

# Of the config: what is said, saved and drawn on the way changes no result.
UNSEEN = (
  'evals',
  'log_every_steps',
  'eval_every_steps',
  'checkpoint_every_steps',
  'checkpoint_every_seconds',
  'sample_every_steps',
  'checkpoints_to_keep',
  'profile_steps',
  'tensorboard',
  'wandb',
)


def run(config: Config, workdir: str) -> int:
  """`--mode=eval`: restores what there is and runs the evals.

  `config.init_from` names a stage's checkpoint directory, and its siblings play
  the other roles; or a run's directory; or an exported one. Empty, or where it
  names the models that this workdir's run started from: the checkpoints of this
  workdir. results.json says which checkpoint each role had. What a run of the
  same config has measured in this workdir stays; `data.text` is needed only
  where `eval.data` has 'heldout', or nothing.

  Raises:
    UserError: there is no checkpoint, or one that does not fit the config.
  """
  check_sources(config)
  hang_seconds = config.cluster.hang_seconds
  with watchdog.watch(hang_seconds):
    session = open_session(config, workdir, HELDOUT in _measured(config))
  directory, given = os.path.join(workdir, 'checkpoints'), config.init_from
  if given.startswith('@'):
    given = checkpoint_beside(workdir, given)
  inside = os.path.join(given, 'checkpoints')
  if given and os.path.isdir(inside) and _stages_beside(inside):
    directory, given = inside, ''
  exported = sources.is_source(given) if given else False
  if given:
    trained_groups(session, given, f'evals read {given}')
    directory = os.path.dirname(os.path.abspath(given))
  paths = _stages_beside(directory)
  if exported:
    # A config may name the models that its run started from: then what the
    # run made of them is measured.
    trained = _stages_beside(os.path.join(workdir, 'checkpoints'))
    source = sources.locate(given)
    paths = (not source.exported and trained) or _stages_of_source(source)
  elif given and checkpoint.read_meta(given)['stage'] == 'imported':
    paths['lm'] = given
  if not paths:
    raise UserError(
      f'evals read {directory}, but no stage has a checkpoint there: train '
      'first, or name one with --config.init_from=DIR/checkpoints/STAGE'
    )
  if HELDOUT in _measured(config):
    check_split(config, paths)
  check_windows(session)
  paths = with_decoder_before(session, paths, os.path.dirname(directory))
  path = os.path.join(workdir, 'results.json')
  old = files.read_json(path) if os.path.exists(path) else {}

  def write(evals, left_out, checkpoints):
    new = head(session)
    del new['result_fingerprint']
    if _is_of_run(old, config, workdir):
      new = _added(old, evals, new)
    else:
      # The stages in there are not of this config: no training is done by them.
      for key in (
        'corpus',
        'evals',
        'contents',
        'checkpoints',
        'result_fingerprint',
      ):
        old.pop(key, None)
      new |= {'fingerprint': ''}
    new['evals'] = _by_dataset(old.get('evals', {}), evals)
    new['left_out'] = left_out
    new['checkpoints'] = old.get('checkpoints', {}) | checkpoints
    files.write_json(path, old | new)

  with (
    jax.set_mesh(session.mesh),
    stop_on_signal() as stop,
    watchdog.watch(hang_seconds),
    tell_of_pauses(),
  ):
    for found in run_evals(session, paths, stop):
      if jax.process_index() == 0:
        write(*found)
  if jax.process_index() == 0:
    report.write(workdir, EVALS)
  say(f'done: {path}, {workdir}/report.html')
  return 0


def write_results(session: Session, stop: threading.Event) -> None:
  """The end of a training run: evals, and `results.json` whole."""
  paths = _stages_beside(os.path.join(session.workdir, 'checkpoints'))
  paths = with_decoder_before(session, paths, session.workdir)
  stages = {
    name: files.read_json(session.record_path(name))
    for name in session.config.stages
  }
  for record in stages.values():
    del record['settings']
  path = os.path.join(session.workdir, 'results.json')
  old = files.read_json(path) if os.path.exists(path) else {}
  if not (
    old.get('result_fingerprint') == result_fingerprint(session.config)
    and is_of_stages(old, stages)
    and is_of_contents(old, session)
    and _has_documents(old, session.workdir)
  ):
    old = {}
    if jax.process_index() == 0:  # what lies there is of another training
      with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(session.workdir, 'documents.json'))
  kept = old.get('evals', {})  # which would come out the same
  missing = [name for name in session.config.evals if name not in kept]

  def write(evals, left_out, checkpoints):
    new = head(session)
    if kept:
      new |= _added(old, evals, new)
    out = new | {
      'contents': old.get('contents', {}) | contents(session),
      'stages': stages,
      'evals': kept | evals,
      'left_out': [*old.get('left_out', []), *left_out],
      'checkpoints': old.get('checkpoints', {}) | checkpoints,
    }
    files.write_json(path, out)

  for found in run_evals(session, paths, stop, missing):
    if jax.process_index() == 0:
      write(*found)


def _added(
  old: dict[str, Any], evals: Iterable[str], new: dict[str, Any]
) -> dict[str, Any]:
  """Of a head: what made the evals that were there, and what these."""
  made = ('git', 'device', 'date')
  later = {key: new[key] for key in made}
  added = old.get('added', {}) | dict.fromkeys(evals, later)
  kept = {key: old.get(key, '') for key in made}
  return kept | {'added': added} if added else kept


def is_complete(config: Config, workdir: str) -> bool:
  """Whether results.json holds all of this config's stages and evals."""
  path = os.path.join(workdir, 'results.json')
  if not os.path.exists(path):
    return False
  done = files.read_json(path)
  # Records of before have the first alone.
  return (
    done.get('fingerprint') == fingerprint(config)
    or done.get('result_fingerprint') == result_fingerprint(config)
  ) and (
    set(config.stages) <= done.get('stages', {}).keys()
    and set(config.evals) <= done.get('evals', {}).keys()
  )


def run_evals(
  session: Session,
  paths: dict[str, str],
  stop: threading.Event,
  names: Sequence[str] | None = None,
) -> Iterator[tuple[dict[str, Any], list[str], dict[str, Any]]]:
  """Runs evals on the checkpoints at `paths`, by stage.

  Args:
    names: which; None takes `config.evals`.

  Yields:
    After each eval (once, where there is none), of all until then: the tables,
    eval -> data set; what was left out of them, and why; and the checkpoint of
    each role that they have rows of.
  """
  loaded: dict[str, Any] = {}
  params = _loader(session, paths, loaded)
  context = Context(session, params, _datasets(session), stop, {}, {}, [])
  evals = {}
  for name in session.config.evals if names is None else names:
    say(f'eval {name}')
    watchdog.phase(f'eval {name}, start')
    evals[name] = {}
    parts = [context._replace(datasets={key: corpus})
             for key, corpus in context.datasets.items()]  # fmt: skip
    for part in [context] if EVALS[name].reads == 'questions' else parts:
      try:
        evals[name] |= EVALS[name].run(part)
      except UserError as e:  # the others are measured all the same
        where = '' if part is context else f' of {next(iter(part.datasets))}'
        context.leave_out(f'eval {name}{where}', str(e))
    if name == 'selection' and evals[name]:
      examples = selection.policy_pictures(context)
      path = os.path.join(session.workdir, 'policy_scores.json')
      if jax.process_index() == 0:
        files.write_json(path, {'examples': examples})
    if not evals[name]:
      context.leave_out(f'eval {name}', 'no checkpoint that it measures')
    if jax.process_index() == 0:
      write_documents(context)
    yield evals, context.left_out, loaded
  if not evals:
    yield {}, [], {}


def check_sources(config: Config) -> None:
  """Refuses texts and questions of the evals that are not there."""
  for source in config.eval.data if config.evals else ():
    if source != HELDOUT and source != 'stdlib' and ':' not in source:
      text_lib.files(source)
    if source in config.data.text:
      say(f'eval.data: {source} is among data.text, so it was trained on; '
          f'{HELDOUT} measures what was not')  # fmt: skip
  questions_lib.check_there(question_files(config))


def check_windows(session: Session) -> None:
  """Says which evals' windows a data set is too short for.

  Raises:
    UserError: there is an eval that no data set is long enough for.
  """
  config = session.config
  names = [name for name in config.evals if EVALS[name].windows]
  datasets = _datasets(session) if names else {}
  for name in names:
    problems = []
    for dataset, corpus in datasets.items():
      try:
        windows_lib.windows(
          corpus,
          corpus.documents('heldout'),
          *EVALS[name].windows(config),
          f'held-out documents of {dataset}',
        )
      except UserError as e:
        problems.append(f'eval {name}: {e}')
    if len(problems) == len(datasets):
      raise UserError(problems[0])
    for problem in problems:
      say(f'{problem}; it will leave that text out')


def check_split(config: Config, paths: Mapping[str, str]) -> None:
  """Refuses to call documents held out that a checkpoint was trained on.

  A document's side is a matter of its hash and the share held out; with a
  larger share than then, some of those held out now were trained on.
  """
  for path in paths.values():
    if checkpoint.latest_step(path) is None:
      continue  # no checkpoint of ours: it has seen none of this text
    then = checkpoint.read_meta(path).get('heldout_fraction')
    now = config.data.heldout_fraction
    if then is not None and now > then:
      raise UserError(
        f'{path} was trained with data.heldout_fraction={then:g}, and with '
        f'{now:g} documents that it was trained on would be held out: set '
        f'--config.data.heldout_fraction={then:g}'
      )


def with_decoder_before(
  session: Session, paths: dict[str, str], run: str
) -> dict[str, str]:
  """The paths, with what the run's first stage started from as its `lm`.

  Where a run begins with a decoder from elsewhere, that is the decoder before
  REFRAG (rows `no_context`, `full_context`, `last_k`).

  Args:
    run: the workdir of the run whose checkpoints these are.
  """
  if 'lm' in paths:
    return paths
  saved = os.path.join(run, 'config.json')
  if os.path.exists(saved):
    values = files.read_json(saved)['config']
  else:
    values = dataclasses.asdict(session.config)
  first = next(iter(values['stages']), '')
  source = (
    values['stage'].get(first, {}).get('init_from') or values['init_from']
  )
  if source.startswith('@'):
    source = checkpoint_beside(run, source)
  if not source:
    return paths
  try:
    if checkpoint.latest_step(source) is not None:
      stage = checkpoint.read_meta(source)['stage']
    elif sources.is_source(source):
      stage = sources.locate(source).exported.get('stage') or 'imported'
    else:
      return paths
    if stage in ('lm', 'imported'):
      trained_groups(session, source, 'the decoder before REFRAG')
      return paths | {'lm': source}
  except UserError as e:
    say(f'there will be no rows of the decoder before REFRAG: {e}')
  return paths


def _by_dataset(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
  """Tables of both, eval -> data set; of the same table the new one."""
  return dict(old) | {
    name: {**old.get(name, {}), **tables} for name, tables in new.items()
  }


def write_documents(context: Context) -> None:
  """documents.json: the document means behind the STATs of results.json.

  A row of this run can so be paired with a row of another one over the same
  text: `doc` are numbers within a data set, and `datasets` has its text's hash.
  """
  session, documents = context.session, context.documents
  path = os.path.join(session.workdir, 'documents.json')
  old = files.read_json(path) if os.path.exists(path) else {}
  new = head(session)
  if _is_of_run(old, session.config, session.workdir):
    documents, new = _by_dataset(old['evals'], documents), old
  elif old.get('result_fingerprint') == new['result_fingerprint']:
    documents = _by_dataset(old['evals'], documents)
  hashes = {name: of.hash for name, of in context.datasets.items()}
  new['datasets'] = new.get('datasets', {}) | hashes
  text = files.json_line(new | {'evals': _rounded(documents)})
  files.write_text(path, text)


def _rounded(tree: Any) -> Any:
  """Six digits are more than any standard error leaves."""
  if isinstance(tree, dict):
    return {key: _rounded(value) for key, value in tree.items()}
  values = np.asarray(tree)
  if values.dtype.kind == 'f':
    return [float(f'{value:.6g}') for value in values]
  return values


def head(session: Session) -> dict[str, Any]:
  """What identifies a results.json."""
  return {
    'config': session.config.name,
    'fingerprint': fingerprint(session.config),
    'result_fingerprint': result_fingerprint(session.config),
    'versions': environment.versions(),
    'git': environment.git_commit(),
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    **({'corpus': session.corpus.hash} if session.corpus else {}),
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
  }


def fingerprint(config: Config) -> str:
  """Changes with any value that can change a number in results.json.

  How and where it is computed does not: runs of several machines, each with a
  mesh that suits it, are one set of results.
  """
  return _fingerprint(dataclasses.asdict(config))


def _fingerprint(values: dict[str, Any]) -> str:
  del values['mesh'], values['cluster'], values['data']['cache_dir']
  for name in ('attention', 'remat', 'scan_layers', 'loss_block'):
    del values['model'][name]
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_fingerprint(config: Config) -> str:
  """As `fingerprint`, without what is only seen while a run is under way.

  And without the evals that it ends in, which change no number of each other.
  """
  values = dataclasses.asdict(config)
  for name in UNSEEN:
    del values[name]
  return _fingerprint(values)


def is_of_stages(done: Mapping[str, Any], records: Mapping[str, Any]) -> bool:
  """Whether a results.json is of these records: none was trained since."""
  stages = done.get('stages', {})
  return all(
    stages.get(name) == {k: v for k, v in record.items() if k != 'settings'}
    for name, record in records.items()
  )


def _has_documents(done: Mapping[str, Any], workdir: str) -> bool:
  """Whether documents.json has the documents behind a results.json."""
  path = os.path.join(workdir, 'documents.json')
  return os.path.exists(path) and (
    files.read_json(path).get('fingerprint') == done.get('fingerprint')
  )


def contents(session: Session) -> dict[str, Any]:
  """What the evals' texts and questions say, by hashes of it."""
  config = session.config
  out = {}
  reads = {EVALS[name].reads for name in config.evals}
  if 'text' in reads:
    datasets = _datasets(session).items()
    out['datasets'] = {name: corpus.hash for name, corpus in datasets}
  if 'questions' in reads:
    out['questions'] = questions_lib.fingerprint(qa.files(config))
  return out


def is_of_contents(done: Mapping[str, Any], session: Session) -> bool:
  """Whether a results.json measured what the evals would read now."""
  then, now = done.get('contents', {}), contents(session)
  return all(then[key] == now[key] for key in then.keys() & now.keys())


def _is_of_run(
  numbers: Mapping[str, Any], config: Config, workdir: str
) -> bool:
  """Whether a file of a workdir is of this config, whatever it measures.

  Which evals run, and on which data, changes no number that is there already;
  config.json has those of the training.
  """
  values = dataclasses.asdict(config)
  path = os.path.join(workdir, 'config.json')
  if os.path.exists(path):
    saved = files.read_json(path)['config']
    values |= {key: saved[key] for key in ('evals', 'eval', 'init_from')}
  return numbers.get('fingerprint') == _fingerprint(values)


def _stages_beside(directory: str) -> dict[str, str]:
  """The stages that have a checkpoint under a directory."""
  paths = {stage: os.path.join(directory, stage) for stage in ROLES.values()}
  return {
    stage: path
    for stage, path in paths.items()
    if checkpoint.latest_step(path) is not None
  }


def _stages_of_source(source: sources.Source) -> dict[str, str]:
  """The stages whose part an export, or a decoder of others, can play."""
  stage = source.exported.get('stage') or 'imported'
  # A policy comes with the `mixed` that it was trained on; what came in from
  # elsewhere is a decoder before REFRAG.
  stages = {'grpo': ('mixed', 'grpo'), 'imported': ('lm',)}.get(stage, (stage,))
  paths = {name: source.where for name in stages if name in ROLES.values()}
  began = source.exported.get('changes', {})
  if 'decoder' in began.get('digests', {}):  # it says what was there before
    paths = {'lm': began['from']} | paths
  return paths


def _loader(session: Session, paths: dict[str, str], loaded: dict[str, Any]):
  """Role -> parameters of its stage's newest checkpoint, loaded once.

  Args:
    loaded: takes, for each role, which checkpoint that was.
  """

  @functools.cache
  def params(role: str):
    path = paths.get(ROLES[role])
    if path is None:
      return None
    inside = os.path.relpath(path, session.workdir)
    loaded[role] = {
      'checkpoint': path if inside.startswith('..') else inside,
      'step': checkpoint.latest_step(path),
    }
    return load_params(session, path, f'evals read {path}')[0]

  return params


def _datasets(session: Session) -> dict[str, Any]:
  """The corpora to measure, each by its name.

  'heldout' in eval.data stands for the held-out side of each source of
  data.text; all of any other text is measured.
  """
  config = session.config
  cache = config.data.cache_dir or os.path.join(session.workdir, 'data')
  tokenizer = tokenizers.load(config.data.tokenizer)
  corpora = []
  for source in _measured(config):
    if source == HELDOUT:
      parts = map(session.corpus.part, range(len(config.data.text)))
      corpora += zip(config.data.text, parts, strict=True)
    else:
      corpora.append(
        (source, corpus_lib.prepare((source,), (1.0,), tokenizer, cache, 1.0))
      )
  names = [_dataset_name(source) for source, _ in corpora]
  out = {}
  for name, (source, corpus) in zip(names, corpora, strict=True):
    # Two files of one name would be one row: then the paths tell them apart,
    # and of one path, its held-out side and all of it, what is measured.
    name = source if names.count(name) > 1 else name
    out[f'{name} (all)' if name in out else name] = corpus
  return out


def _measured(config: Config) -> tuple[str, ...]:
  return config.eval.data or (HELDOUT,)


def _dataset_name(source: str) -> str:
  if source.startswith('tfds:'):  # its last part is a version, or a config
    return source
  return os.path.basename(source.rstrip('/')).split('.')[0] or source
