"""`--mode=import` and `--mode=export`: Hugging Face directories in and out."""

import dataclasses
import os
import shutil
import tempfile

import jax
import numpy as np

from refrag_jax import (
  checkpoint,
  convert_hf,
  environment,
  hf_families,
  hub,
  pretrained,
  results,
  session,
)
from refrag_jax.config import Config
from refrag_jax.data import tokenizers
from refrag_jax.errors import UserError
from refrag_jax.progress import say
from refrag_jax.state import TrainState


def run_import(config: Config, workdir: str, source: str, target: str) -> int:
  """Hugging Face models to a checkpoint that a stage can start from.

  Args:
    source: as in pretrained.py.
    target: the checkpoint's directory; '' is <workdir>/checkpoints/imported.

  Raises:
    UserError: what is there does not fit the config, or is damaged; then
      nothing is written.
  """
  if not source:
    raise UserError(
      '--mode=import needs --from=DECODER[,ENCODER]: directories or hub names'
    )
  target = target or os.path.join(workdir, 'checkpoints', 'imported')
  if checkpoint.latest_step(target) is not None:
    raise UserError(f'{target} holds a checkpoint already: name another --to')
  opened = session.open_model(config)
  with jax.set_mesh(opened.mesh):
    params, groups = session.load_params(opened, source, f'--from={source}')
    manager = checkpoint.open_manager(target)
    meta = {'stage': 'imported', 'trained': sorted(groups), 'from': source}
    state = TrainState(np.int32(0), {g: params[g] for g in groups}, {})
    checkpoint.save(manager, 0, state, meta | opened.identity, 0.0)
    manager.wait_until_finished()
    manager.close()
  say(f'done: {target} ({", ".join(sorted(groups))})')
  return 0


def run_export(config: Config, workdir: str, source: str, target: str) -> int:
  """A stage's checkpoint to directories that transformers loads.

  Args:
    source: the checkpoint's directory.
    target: `decoder/` and `encoder/` as ordinary models, projection and policy
      as safetensors, and refrag.json. It appears whole.

  Raises:
    UserError: there is no such checkpoint, or the target is not empty.
  """
  if not source or not target:
    raise UserError(
      '--mode=export needs --from=CHECKPOINT, such as '
      f'{workdir}/checkpoints/mixed, and --to=DIR'
    )
  if jax.process_count() > 1:
    raise UserError('--mode=export wants one process: run it on one machine')
  if os.path.isfile(target) or (os.path.isdir(target) and os.listdir(target)):
    raise UserError(f'{target} is there, and not empty: name another --to')
  opened = session.open_model(config)
  with jax.set_mesh(opened.mesh):
    params, groups = session.load_params(opened, source, f'--from={source}')
  stage = (checkpoint.read_meta(source) or {}).get('stage', '')
  parent = os.path.dirname(os.path.abspath(target))
  os.makedirs(parent, exist_ok=True)
  temporary = tempfile.mkdtemp(dir=parent, prefix='.writing-')
  try:
    _write(opened, params, groups, stage, temporary)
    os.chmod(temporary, 0o755)
    if os.path.exists(target):
      os.rmdir(target)
    os.rename(temporary, target)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  say(f'done: {target} ({", ".join(sorted(groups))})')
  return 0


def _write(opened, params, groups, stage: str, target: str) -> None:
  config, files = opened.config, []
  model = config.model
  for group, values, tokenizer in (
    ('decoder', hf_families.decoder_json(model.decoder), config.data.tokenizer),
    (
      'encoder',
      hf_families.encoder_json(model.encoder),
      config.data.encoder_tokenizer,
    ),
  ):
    if group not in groups:
      continue
    directory = os.path.join(target, group)
    os.mkdir(directory)
    ids = tokenizers.load(tokenizer)
    values = values | {'bos_token_id': ids.bos_id, 'eos_token_id': ids.eos_id}
    written = convert_hf.write_params(
      directory, group, params[group], values, np.float32
    )
    files += [f'{group}/{name}' for name in written]
    if group == 'encoder':  # as sentence encoders say it
      results.write_json(
        os.path.join(directory, '1_Pooling', 'config.json'),
        {
          'word_embedding_dimension': model.encoder.width,
          'pooling_mode_cls_token': model.encoder.pooling == 'cls',
          'pooling_mode_mean_tokens': model.encoder.pooling == 'mean',
        },
      )
    for name in tokenizers.FILES if tokenizer != 'bytes' else ():
      path = os.path.join(hub.resolve(tokenizer, weights=False), name)
      if os.path.exists(path):
        shutil.copyfile(path, os.path.join(directory, name))
  for group in pretrained.SMALL:
    if group in groups:
      files.append(f'{group}.safetensors')
      convert_hf.save_arrays(os.path.join(target, files[-1]), params[group])
  results.write_json(
    os.path.join(target, pretrained.EXPORT),
    {
      'format': pretrained.FORMAT,
      'stage': stage,
      'groups': sorted(groups),
      'model': {
        group: dataclasses.asdict(getattr(model, group))
        for group in ('decoder', 'encoder', 'policy')
      },
      'chunk_size': model.chunk_size,
      'piece_length': model.piece_length,
      'templates': {
        name: getattr(config.data, name)
        for name in ('question_template', 'passage_template', 'answer_template')
      },
      'tokenizers': opened.identity['tokenizers'],
      'sha256': {
        name: convert_hf.digest(os.path.join(target, name), 0, 0)
        for name in files
      },
      'versions': environment.versions(),
      'git': environment.git_commit(),
    },
  )
