"""What training and evaluation both start from: mesh, model, data, shapes."""

import dataclasses
import functools
import os
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from refrag_jax import checkpoint, sharding
from refrag_jax.config.schema import Config, ModelConfig
from refrag_jax.data import pipeline, tokenizers
from refrag_jax.errors import UserError
from refrag_jax.hf import sources
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.runtime import files
from refrag_jax.runtime.progress import say
from refrag_jax.stages import STAGES, beside
from refrag_jax.state import partition

PLATFORM_KERNELS = {'gpu': 'cudnn', 'tpu': 'splash'}


class Session(NamedTuple):
  config: Config
  workdir: str
  mesh: jax.sharding.Mesh
  model: Refrag
  tokenizer: Any
  corpus: Any  # the run's own text; None where that is not needed
  identity: dict[str, Any]  # what a checkpoint must agree with

  def checkpoint_dir(self, stage: str) -> str:
    return os.path.join(self.workdir, 'checkpoints', stage)

  def record_path(self, stage: str) -> str:
    return os.path.join(self.workdir, 'stages', f'{stage}.json')


def open_session(
  config: Config, workdir: str, with_text: bool = True
) -> Session:
  """Checks what no config check can, then opens the data.

  Args:
    with_text: whether the run's own text is needed.

  Raises:
    UserError: the mesh, the vocabulary or the text does not fit.
  """
  session = open_model(config, workdir)
  check_batches(session)
  check_trains(session)
  session = settle_attention(session)
  if config.model.attention == 'fused':
    say(f'attention: fused is {session.config.model.attention} here')
  if not with_text:
    return session
  corpus = pipeline.prepare_corpus(config, os.path.join(workdir, 'data'))
  return session._replace(corpus=corpus)


def open_data(config: Config, workdir: str) -> Session:
  """A session with the text and nothing that needs a device."""
  tokenizer = tokenizers.load(config.data.tokenizer)
  corpus = pipeline.prepare_corpus(config, os.path.join(workdir, 'data'))
  return Session(config, workdir, None, None, tokenizer, corpus, {})


def check_batches(session: Session) -> None:
  """Refuses batches that the devices cannot share out evenly."""
  ways = sharding.axis_size('batch', session.mesh)
  parts = sharding.axis_size('sequence', session.mesh)
  for name in session.config.stages:
    cfg = session.config.stage[name]
    rows, pieces = cfg.batch_size, cfg.accumulation_steps
    if (rows // pieces) % ways:
      step = ways * pieces
      raise UserError(
        f'stage {name}: batch_size {rows} / accumulation_steps {pieces} does '
        f'not divide over {ways} devices (mesh data x fsdp); '
        f'batch_size={rows + -rows % step} would'
      )
    # The rows of the other stages are filled up.
    shapes = STAGES[name].task.row_shapes(session.config, name, 1)
    if 'tokens_BT' in shapes and cfg.output_length % parts:
      raise UserError(
        f'stage {name}: output_length {cfg.output_length} does not divide over '
        f'{parts} devices (mesh sequence); output_length='
        f'{cfg.output_length + -cfg.output_length % parts} would'
      )


def check_trains(session: Session) -> None:
  """Refuses to freeze all that a stage would train, or what is not there."""
  params = abstract_params(session)
  for name in session.config.stages:
    cfg = session.config.stage[name]
    if not cfg.freeze:
      continue
    found, _ = partition(params, cfg.freeze)
    if not jax.tree.leaves(found):
      leaves = jax.tree_util.tree_leaves_with_path(params)
      raise UserError(
        f'config.stage.{name}.freeze {cfg.freeze!r} matches no parameter; they '
        f'have paths such as {sharding.path_str(leaves[0][0])}'
      )
    trained, _ = STAGES[name].partition(params, cfg.freeze)
    if not jax.tree.leaves(trained):
      raise UserError(
        f'config.stage.{name}.freeze {cfg.freeze!r} leaves nothing to train: '
        'name fewer parameters, or take the stage out'
      )


def settle_attention(session: Session) -> Session:
  """With the kernel that `fused` stands for; refuses another platform's.

  Where the platform's kernel cannot run it stands for `blockwise`; so it does
  for cards that are described and not here, without their cuDNN.

  Raises:
    UserError: the config names a kernel of another platform.
  """
  model, device = session.config.model, session.mesh.devices.flat[0]
  kind, platform = model.attention, device.platform
  if kind == 'fused':
    able = platform == 'tpu' or (platform == 'gpu' and _cudnn(model, device))
    whole_rows = session.mesh.shape['sequence'] == 1
    kind = PLATFORM_KERNELS[platform] if able and whole_rows else 'blockwise'
    model = dataclasses.replace(model, attention=kind)
    config = dataclasses.replace(session.config, model=model)
    return session._replace(config=config, model=Refrag(model))
  for needed, kernel in PLATFORM_KERNELS.items():
    if kind == kernel and platform != needed:
      raise UserError(
        f'config.model.attention is {kind}, a kernel for {needed} devices; '
        f'these are {platform}: use fused, which is what each has, or '
        'blockwise, which is for all'
      )
  return session


def _cudnn(model: ModelConfig, device: jax.Device) -> bool:
  """Whether cuDNN's kernel can run: from Ampere on, in 16 bits, here."""
  number = re.fullmatch(r'\d+\.\d+', getattr(device, 'compute_capability', ''))
  capability = float(number[0]) if number else 0.0
  widest = 256 if capability >= 9 else 128
  return (
    device in jax.devices()
    and capability >= 8
    and model.compute_dtype == 'bfloat16'
    and model.decoder.head_dim in range(8, widest + 1, 8)
  )


def open_model(config: Config, workdir: str = '') -> Session:
  """A session without text; the errors of `open_session`."""
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  tokenizer = tokenizers.load(config.data.tokenizer)
  encoder_tokenizer = tokenizers.load(config.data.encoder_tokenizer)
  tokenizers.check_vocab(
    tokenizer, config.model.decoder.vocab_size, 'model.decoder'
  )
  tokenizers.check_vocab(
    encoder_tokenizer, config.model.encoder.vocab_size, 'model.encoder'
  )
  identity = {
    'model': {
      # What shapes the parameters; the rest may change between runs.
      key: files.plain(value)  # as checkpoints give it back
      for key, value in dataclasses.asdict(config.model).items()
      if key in ('decoder', 'encoder', 'policy', 'chunk_size', 'piece_length')
    }
    | {'lora': files.plain(_adapters(config.model))},
    'tokenizers': {
      'decoder': tokenizer.fingerprint,
      'encoder': encoder_tokenizer.fingerprint,
    },
  }
  return Session(
    config, workdir, mesh, Refrag(config.model), tokenizer, None, identity
  )


def _adapters(model: ModelConfig) -> dict[str, Any]:
  """What tells adapters apart; without any, the rest means nothing."""
  if not model.lora.rank:
    return {'rank': 0}
  values = dataclasses.asdict(model.lora)
  del values['dropout']  # how they are trained
  return values


def checkpoint_beside(workdir: str, source: str) -> str:
  """The checkpoint directory that '@RUN/STAGE' means in a run's config."""
  run, stage = beside(source, 'init_from')
  parent = os.path.dirname(os.path.abspath(workdir))
  return os.path.join(parent, run, 'checkpoints', stage)


def load_params(
  session: Session, directory: str, why: str
) -> tuple[dict, list[str]]:
  """What a stage's checkpoint has trained, and fresh parameters beside it.

  Args:
    directory: of a checkpoint, or a source as in hf/sources.py.

  Returns:
    Parameters of all groups, and the names of those that were read.
  """
  groups = trained_groups(session, directory, why)
  abstract = abstract_params(session)
  wanted = {group: abstract[group] for group in groups}
  if sources.is_source(directory):
    read = read_source(session, sources.locate(directory), wanted, why)
  else:
    base = (checkpoint.read_meta(directory) or {}).get('base_decoder')
    kept = {x: wanted[x] for x in wanted if not (base and x == 'decoder')}
    read = checkpoint.load_params(directory, kept)
    if base:
      read['decoder'] = read_base_decoder(session, base, why)
  rest = [group for group in abstract if group not in groups]
  return fresh_params(session, rest) | read, groups


def read_source(
  session: Session, source: sources.Source, wanted: dict, why: str
) -> dict:
  """The groups of a source that are wanted, by their shapes and shardings.

  Raises:
    UserError: it holds changes of models that are not there, or are others.
  """
  if 'changes' not in source.exported:
    paths = {group: source.paths[group] for group in wanted}
    return sources.read(source._replace(paths=paths), wanted)
  began = source.exported['changes']
  abstract = abstract_params(session)
  found = sources.locate(began['from'])
  before = sources.read(
    found, {group: abstract[group] for group in found.paths}
  )
  for group, digest in began['digests'].items():
    if checkpoint.digest(before[group]) != digest:
      raise UserError(
        f'{why}, where there is only what training changed of the {group} in '
        f'{began["from"]}, and what lies there now is another one'
      )
  whole = {group: abstract[group] for group in source.paths}
  changed = sources.read_changes(source, whole, before)
  return {group: changed[group] for group in wanted}


def base_decoder(session: Session, source: str, params: dict) -> dict[str, Any]:
  """What checkpoints hold of a decoder that only adapters are trained for.

  Args:
    source: where it was read from, as in `load_params`.
  """
  if not sources.is_source(source):
    known = (checkpoint.read_meta(source) or {}).get('base_decoder')
    if known:  # of the first of them, which has the arrays
      return known
    source = os.path.abspath(source)
  return {'source': source, 'digest': checkpoint.digest(params['decoder'])}


def read_base_decoder(session: Session, base: dict[str, Any], why: str) -> dict:
  """The decoder that adapters were trained for, from where it lies.

  Raises:
    UserError: it is not there any more, or is another one.
  """
  source = base['source']
  wanted = {'decoder': abstract_params(session)['decoder']}
  if sources.is_source(source):
    found = sources.locate(source)
    decoder = read_source(session, found, wanted, why)['decoder']
  elif checkpoint.latest_step(source) is None:
    raise UserError(
      f'{why}, which has adapters alone: the decoder that they were trained '
      f'for was in {source}, where it is no more'
    )
  else:
    decoder = checkpoint.load_params(source, wanted)['decoder']
  if checkpoint.digest(decoder) != base['digest']:
    raise UserError(
      f'{why}, which has adapters alone, and {source} now holds another '
      'decoder than the one that they were trained for'
    )
  return decoder


def base_models(source: str | None) -> dict[str, Any]:
  """The pretrained models behind a starting point, as in pretrained.base.

  Args:
    source: as in `load_params`; None: training starts from nothing.
  """
  if source is None:
    return {}
  if sources.is_source(source):
    return sources.base(sources.locate(source))
  return (checkpoint.read_meta(source) or {}).get('base', {})


def trained_groups(session: Session, directory: str, why: str) -> list[str]:
  """The parameter groups that a checkpoint and those before it have trained.

  The others need not fit: one `lm` serves every encoder and chunk size, one
  `mixed` several policies.

  Raises:
    UserError: there is no checkpoint, or what it has trained does not fit.
  """
  if sources.is_source(directory):
    source = sources.locate(directory)
    sources.check(
      source, session.config.model, session.identity['tokenizers'], why
    )
    data, paths = session.config.data, source.paths
    for group, which, name in (
      ('decoder', 'tokenizer', data.tokenizer),
      ('encoder', 'encoder_tokenizer', data.encoder_tokenizer),
    ):
      if group in paths and not source.exported:
        tokenizers.check_own(tokenizers.load(name), paths[group], which)
    return list(paths)
  groups = checkpoint.require(directory, {}, why)['trained']
  identity = {part: dict(of) for part, of in session.identity.items()}
  if 'projection' not in groups:  # the first that knows chunks
    del identity['model']['chunk_size']
  if 'encoder' not in groups:
    del identity['model']['encoder']
    del identity['tokenizers']['encoder']
  if 'policy' not in groups:
    del identity['model']['policy']
  if 'cross' not in groups:
    del identity['model']['piece_length']
  if 'lora' not in groups:
    del identity['model']['lora']
  checkpoint.require(directory, identity, why)
  return groups


def fresh_params(session: Session, groups: Collection[str]) -> dict:
  """Initial parameters of some groups, on the mesh; the seed fixes them."""
  if not groups:  # of the whole model nothing would be left to compile
    return {}
  abstract = abstract_params(session)
  shardings = jax.tree.map(
    lambda x: x.sharding, {group: abstract[group] for group in groups}
  )
  init = jax.jit(
    _init_groups, static_argnames=('cfg', 'groups'), out_shardings=shardings
  )
  key = jax.random.key(session.config.seed)
  return init(key, cfg=session.config.model, groups=tuple(groups))


def _init_groups(
  key: jax.Array, *, cfg: ModelConfig, groups: Collection[str]
) -> dict:
  params = init_params(cfg, key)
  return {group: params[group] for group in groups}


def abstract_params(session: Session) -> dict:
  """Shapes and shardings of the parameters; nothing is allocated."""
  return with_shardings(_shapes(session.config.model), session.mesh)


@functools.cache
def _shapes(cfg: ModelConfig) -> dict:
  return jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))


def with_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.infer_shardings(tree, mesh),
  )


def to_device(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict:
  """This process's rows of a batch, as global arrays over the mesh.

  Args:
    batch: the rows of `sharding.local_rows`, in that order.
  """
  rows = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(rows, values)
    for name, values in batch.items()
  }
