"""`--mode=import` and `--mode=export`: Hugging Face directories in and out."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from refrag_jax import checkpoint, session
from refrag_jax.config.schema import Config
from refrag_jax.data import tokenizers
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, families, hub, model_card, sources
from refrag_jax.hf.found import EXPORT
from refrag_jax.models import lora
from refrag_jax.runtime import environment
from refrag_jax.runtime import files as files_lib
from refrag_jax.runtime.progress import say
from refrag_jax.state import TrainState

ADAPTER = 'adapter'  # the directory of an export that has them by themselves


def run_import(config: Config, workdir: str, source: str, target: str) -> int:
  """Hugging Face models to a checkpoint that a stage can start from.

  Args:
    source: as in hf/sources.py.
    target: the checkpoint's directory; '' is <workdir>/checkpoints/imported.

  Raises:
    UserError: what is there does not fit the config, or is damaged; then
      nothing is written.
  """
  if not source:
    raise UserError(
      '--mode=import needs --from=DECODER[,ENCODER]: directories or hub names'
    )
  if target:
    target = os.path.realpath(os.path.expanduser(target))
    if os.path.lexists(target) and not os.path.isdir(target):
      raise UserError(f'--to={target} is a file: name a directory')
    there = sorted(os.listdir(target)) if os.path.isdir(target) else []
    others = [name for name in there if not name[0].isdigit()]  # no steps
    if others:
      raise UserError(
        f'--to={target} holds something else ({others[0]}): name a new '
        'directory, or leave --to out'
      )
  target = target or os.path.join(workdir, 'checkpoints', 'imported')
  if checkpoint.latest_step(target) is not None:
    raise UserError(f'{target} holds a checkpoint already: name another --to')
  opened = session.open_model(config)
  with jax.set_mesh(opened.mesh):
    params, groups = session.load_params(opened, source, f'--from={source}')
    manager = checkpoint.open_manager(target)
    meta = {'stage': 'imported', 'trained': sorted(groups), 'from': source}
    meta['base'] = session.base_models(source)
    state = TrainState(np.int32(0), {g: params[g] for g in groups}, {})
    checkpoint.save(manager, 0, state, meta | opened.identity, 0.0)
    manager.wait_until_finished()
    manager.close()
  say(f'done: {target} ({", ".join(sorted(groups))})')
  return 0


def run_export(
  config: Config, workdir: str, source: str, target: str, changes: bool = False
) -> int:
  """A stage's checkpoint to directories that transformers loads.

  Args:
    source: the checkpoint's directory.
    changes: only what training has changed, as in `_write_changes`.
    target: `decoder/` and `encoder/` as ordinary models, projection and policy
      as safetensors, refrag.json, and README.md, which explains them. Of a
      decoder with adapters both the merged one and `adapter/`, as PEFT loads
      them. It appears whole.

  Raises:
    UserError: there is no such checkpoint, or the target cannot be written.
  """
  if not source or not target:
    raise UserError(
      '--mode=export needs --from=CHECKPOINT, such as '
      f'{workdir}/checkpoints/mixed, and --to=DIR'
    )
  if jax.process_count() > 1:
    raise UserError('--mode=export wants one process: run it on one machine')
  data = config.data
  read = (*source.split(','), data.tokenizer, data.encoder_tokenizer)
  with _appears_whole(target, read) as directory:
    opened = session.open_model(config)
    with jax.set_mesh(opened.mesh):
      params, groups = session.load_params(opened, source, f'--from={source}')
    params = {group: params[group] for group in groups}
    stage = (checkpoint.read_meta(source) or {}).get('stage', '')
    if changes:
      _write_changes(opened, params, source, stage, directory)
    else:
      _write(opened, params, session.base_models(source), stage, directory)
  say(f'done: {target} ({", ".join(sorted(groups))})')
  return 0


@contextlib.contextmanager
def _appears_whole(target: str, read: Iterable[str]) -> Iterator[str]:
  """An empty directory that takes the target's place at the end, or vanishes.

  Args:
    target: not there, or an empty directory; what a link stands for.
    read: names of which those that are directories are the user's.

  Raises:
    UserError: nothing can be written there, or not without harm.
  """
  why = f'--to={target}'
  target = os.path.realpath(os.path.expanduser(target))
  for name in filter(os.path.isdir, read):
    directory = os.path.realpath(name)
    if os.path.commonpath([directory, target]) == directory:
      raise UserError(f'{why} lies in {name}, which is read: name another --to')
  if os.path.lexists(target) and not os.path.isdir(target):
    raise UserError(f'{why} is a file: name a directory, new or empty')
  if os.path.isdir(target) and os.listdir(target):
    raise UserError(f'{target} is there, and not empty: name another --to')
  if os.path.ismount(target) or target == os.path.realpath(os.curdir):
    raise UserError(
      f'{why} is the current directory or a whole disk, which cannot be '
      'replaced: name a new directory in it'
    )
  parent, name = os.path.split(target)
  new, above = [], parent
  while not os.path.lexists(above):
    new.append(above)
    above = os.path.dirname(above)
  outer = None
  try:
    try:
      os.makedirs(parent, exist_ok=True)
      outer = tempfile.mkdtemp(dir=parent, prefix='.writing-')
      os.mkdir(os.path.join(outer, name))
    except OSError as e:
      raise UserError(
        f'{why} cannot be written ({e.strerror}): name another --to'
      ) from None
    yield os.path.join(outer, name)
    _sync(outer)
    try:
      os.rename(os.path.join(outer, name), target)
    except OSError as e:
      raise UserError(
        f'{why} was written by somebody else meanwhile ({e.strerror}): name '
        'another --to'
      ) from None
    new = []
  finally:
    if outer is not None:
      shutil.rmtree(outer, ignore_errors=True)
    for directory in new:
      with contextlib.suppress(OSError):  # not made, or no longer empty
        os.rmdir(directory)


def _sync(directory: str) -> None:
  """Puts all in it on the disk, so that the rename is not there before it."""
  for folder, _, files in os.walk(directory):
    for path in (folder, *(os.path.join(folder, name) for name in files)):
      handle = os.open(path, os.O_RDONLY)
      try:
        os.fsync(handle)
      finally:
        os.close(handle)


def _check_room(size: int, directory: str) -> None:
  """Refuses what the disk has no room for, before most of it is written."""
  free = shutil.disk_usage(directory).free
  if size > free:
    raise UserError(
      f'the export needs {size / 1e9:.2f} GB, and the disk of --to has '
      f'{free / 1e9:.2f} left: make room, or name another --to'
    )


def _size(params: dict, dtypes: dict) -> int:
  """Bytes of all groups, each in the widest of the types that it came in."""
  size = 0
  for group, values in params.items():
    kinds = dtypes.get(group, {}).values() or ['float32']
    width = max(np.dtype(jax.numpy.dtype(kind)).itemsize for kind in kinds)
    size += width * sum(x.size for x in jax.tree.leaves(values))
  return size


def _dtypes(values: dict, base: dict) -> dict[str, str]:
  """The types that a group is written in: those that it came in.

  float16 holds nothing above 65504; what training has brought there stays as
  it is here, in float32.
  """
  dtypes = base.get('dtypes', {})
  if 'float16' not in dtypes.values():
    return dtypes
  most = max(float(abs(x).max()) for x in jax.tree.leaves(values))
  if most <= float(np.finfo(np.float16).max):
    return dtypes
  return {name: kind for name, kind in dtypes.items() if kind != 'float16'}


def _write(opened, params, bases: dict, stage: str, target: str) -> None:
  config, files = opened.config, []
  model = config.model
  if 'lora' in params:  # an ordinary model has no place for it
    name = bases.get('decoder', {}).get('name', '')
    os.mkdir(os.path.join(target, ADAPTER))
    written = convert.write_adapters(
      os.path.join(target, ADAPTER), params['lora'], model.lora, name
    )
    files += [f'{ADAPTER}/{file}' for file in written]
    params = lora.merge(params, model.lora)
  names = {
    'decoder': config.data.tokenizer,
    'encoder': config.data.encoder_tokenizer,
  }
  dtypes = {
    group: _dtypes(params[group], bases[group])
    for group in names
    if group in params and group in bases
  }
  _check_room(_size(params, dtypes), target)
  for group, tokenizer in names.items():
    if group not in params:
      continue
    directory = os.path.join(target, group)
    os.mkdir(directory)
    base, ids = bases.get(group, {}), tokenizers.load(tokenizer)
    values = families.config_json(
      group, getattr(model, group), base.get('config', {})
    )
    special = {
      'bos_token_id': ids.bos_id,
      'eos_token_id': ids.eos_id,
      'pad_token_id': ids.pad_id,
    }
    written = convert.write_params(
      directory,
      group,
      params[group],
      special | values,
      dtypes.get(group, np.float32),
      _pooler(base) if group == 'encoder' else {},
    )
    if group == 'encoder':
      _write_modules(directory, model.encoder, base.get('modules', []))
    if tokenizer != 'bytes':
      tokenizers.copy_files(
        hub.resolve(tokenizer, weights=False),
        directory,
        (*tokenizers.FILES, *tokenizers.BESIDE),
      )
    files += [f'{group}/{name}' for name in written]
  for group in sources.SMALL:
    if group in params:
      files.append(f'{group}.safetensors')
      convert.save_arrays(os.path.join(target, files[-1]), params[group])
  base = {
    group: bases[group] | {'dtypes': kinds} for group, kinds in dtypes.items()
  }
  _write_record(opened, params, stage, target, files, {'base': base})


def _write_changes(
  opened, params, source: str, stage: str, target: str
) -> None:
  """One file of the arrays that are not those of the models at the start.

  In bfloat16. refrag.json names those models, with digests of their arrays: it
  takes them to read this.

  Raises:
    UserError: training did not start from models of others.
  """
  bases = session.base_models(source)
  names = [of['name'] for of in bases.values()]
  if not names:
    raise UserError(
      f'--changes: {source} was not trained from models of others, so that '
      'there is nothing to leave out; export it whole'
    )
  found = sources.locate(','.join(names))
  abstract = session.abstract_params(opened)
  before = sources.read(found, {group: abstract[group] for group in bases})
  old, new = checkpoint.flat(before), checkpoint.flat(params)
  changed = [
    path
    for path, x in new.items()
    if path not in old or not np.array_equal(x, old[path])
  ]
  width = jax.numpy.dtype(jax.numpy.bfloat16).itemsize
  _check_room(width * sum(new[path].size for path in changed), target)
  convert.save_arrays(
    os.path.join(target, sources.CHANGES), params, changed, jax.numpy.bfloat16
  )
  of_start = {
    'from': found.where,
    'digests': {group: checkpoint.digest(before[group]) for group in before},
  }
  _write_record(
    opened, params, stage, target, [sources.CHANGES],
    {'base': bases, 'changes': of_start},
  )  # fmt: skip


def _write_record(opened, params, stage, target, files, more: dict) -> None:
  """refrag.json and README.md of an export; `more` says where it began."""
  config, model = opened.config, opened.config.model
  groups = ('decoder', 'encoder', 'policy')
  groups += ('lora',) if 'lora' in params else ()
  exported = {
    'format': sources.FORMAT,
    'stage': stage,
    'config': dataclasses.asdict(_portable(config)),
    'groups': sorted(params),
    **more,
    'model': {
      group: families.shortest(dataclasses.asdict(getattr(model, group)))
      for group in groups
    },
    'chunk_size': model.chunk_size,
    'piece_length': model.piece_length,
    'max_encoder_tokens': config.data.max_encoder_tokens,
    'history_chunks': config.data.history_chunks,
    'templates': {
      name: getattr(config.data, name)
      for name in (
        'chat',
        'question_template',
        'passage_template',
        'answer_template',
      )
    },
    'tokenizers': opened.identity['tokenizers'],
    'sha256': {
      name: convert.digest(os.path.join(target, name), 0, 0) for name in files
    },
    'versions': environment.versions(),
    'git': environment.git_commit(),
  }
  files_lib.write_json(os.path.join(target, EXPORT), exported)
  files_lib.write_text(
    os.path.join(target, 'README.md'), model_card.text(exported)
  )


def _portable(config):
  """The config without what names files of this machine, but its models."""
  stdlib = ('stdlib',)
  return dataclasses.replace(
    config,
    wandb='',
    data=dataclasses.replace(
      config.data, text=stdlib, weights=(1.0,), questions=stdlib,
      question_weights=(), cache_dir='',
    ),
    eval=dataclasses.replace(config.eval, data=(), questions=()),
  )  # fmt: skip


def _pooler(base: dict) -> dict[str, np.ndarray]:
  """The pooler of a BERT, which REFRAG does not run, as it came.

  Where the model has gone meanwhile, transformers makes a new one.
  """
  try:
    directory = hub.resolve(base['name']) if base else ''
    return convert.module_tensors(directory, 'pooler') if base else {}
  except UserError as e:
    say(f'encoder: written without its pooler ({e})')
    return {}


def _write_modules(directory: str, encoder, modules: list[dict]) -> None:
  """What sentence encoders say of themselves: which modules, what pooling.

  Modules without weights go along; those with weights that were left out when
  the model came in are left out here.
  """
  kept = [m for m in modules if m['kind'] == 'Normalize']
  types = {m['kind']: m['type'] for m in modules}
  shown = [('Transformer', ''), ('Pooling', '1_Pooling')]
  shown += [(m['kind'], f'{i + 2}_{m["kind"]}') for i, m in enumerate(kept)]
  files_lib.write_json(
    os.path.join(directory, 'modules.json'),
    [
      {
        'idx': i,
        'name': str(i),
        'path': path,
        'type': types.get(kind, f'sentence_transformers.models.{kind}'),
      }
      for i, (kind, path) in enumerate(shown)
    ],
  )
  for _, path in shown[2:]:
    os.mkdir(os.path.join(directory, path))
  files_lib.write_json(
    os.path.join(directory, '1_Pooling', 'config.json'),
    {
      'word_embedding_dimension': encoder.width,
      'pooling_mode_cls_token': encoder.pooling == 'cls',
      'pooling_mode_mean_tokens': encoder.pooling == 'mean',
    },
  )
