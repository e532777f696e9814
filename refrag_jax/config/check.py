"""Refuses configs that cannot work, before anything is allocated.

What needs the tokenizer (vocabulary) or the devices (the mesh) is checked when
they are known, in session.py.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from refrag_jax.config import typed
from refrag_jax.config.schema import Config, ModelConfig
from refrag_jax.errors import UserError

LENGTHS = (
  'output_lengths',
  'reconstruct_lengths',
  'copy_lengths',
  'context_lengths',
)
SELECTORS = ('rl', 'ppl_desc', 'ppl_asc', 'random', 'last', 'oracle')
CONTEXTS = ('none', 'last_k', 'full')
SCHEDULES = ('cosine', 'linear', 'constant')
KERNELS = ('cudnn', 'splash')
ATTENTION = ('dense', 'blockwise', *KERNELS, 'fused')
LORA_TARGETS = (
  'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj',
)  # fmt: skip
# Numbers of config.model that may be 0; all others are above it.
MAY_BE_ZERO = {
  'model.': ('loss_block', 'piece_length'),
  'model.decoder.': ('rope_original_length', 'sliding_window', 'max_length'),
  'model.encoder.': (
    'position_offset',
    'global_every',
    'local_window',
    'rope_theta',
    'local_rope_theta',
  ),
  'model.policy.': (),
  'model.lora.': ('rank', 'dropout'),
}


def check(config: Config) -> None:
  """Refuses what cannot work, whatever stages and evals there are.

  What a stage or an eval needs of its section is checked by itself; all of it
  together in resolve.py.
  """
  _check_run(config)
  _check_model(config.model)
  _check_data(config)
  _check_eval(config)


def positive(section: Any, prefix: str, *names: str) -> None:
  """Refuses numbers that are not greater than 0."""
  for name in names:
    value = getattr(section, name)
    if value <= 0:
      raise UserError(
        f'config.{prefix}{name} is {value}: it must be greater than 0'
      )


def not_negative(section: Any, prefix: str, *names: str) -> None:
  """Refuses numbers below 0."""
  for name in names:
    value = getattr(section, name)
    if value < 0:
      raise UserError(
        f'config.{prefix}{name} is {value}: it must be 0 or greater'
      )


def known(values: Sequence[str], there: Collection[str], key: str) -> None:
  """Refuses a name that there is not; says the nearest."""
  for value in values:
    hint = f'; there are {", ".join(there)}'
    if len(there) > 4:
      hint = typed.did_you_mean(value, there) or hint
    if value not in there:
      raise UserError(f'config.{key}: there is no {value!r}{hint}')


def names(chosen: Sequence[str], there: Collection[str], key: str) -> None:
  """Refuses unknown names of stages or evals, and a name that stands twice."""
  known(chosen, there, key)
  double = [name for name in chosen if chosen.count(name) > 1]
  if double:
    raise UserError(f'config.{key} names {double[0]!r} twice: delete one')


def _check_run(config: Config) -> None:
  not_negative(config, '', 'seed')
  positive(config, '', 'log_every_steps', 'checkpoints_to_keep')
  _check_optimizer(config)
  not_negative(
    config,
    '',
    'eval_every_steps',
    'checkpoint_every_steps',
    'checkpoint_every_seconds',
  )
  free = [
    field.name
    for field in dataclasses.fields(config.mesh)
    if getattr(config.mesh, field.name) == -1
  ]
  if len(free) > 1:
    raise UserError(
      f'config.mesh: {" and ".join(free)} are both -1, but only one axis can '
      'take the devices that the others leave: give the other one a size'
    )
  for field in dataclasses.fields(config.mesh):
    size = getattr(config.mesh, field.name)
    if size < 1 and size != -1:
      raise UserError(
        f'config.mesh.{field.name} is {size}: use 1 or more, or -1 for the '
        'devices that the other axes leave'
      )
  positive(config.cluster, 'cluster.', 'join_seconds', 'heartbeat_seconds')
  not_negative(config.cluster, 'cluster.', 'hang_seconds')
  kernel = config.model.attention in KERNELS
  if kernel and config.mesh.sequence != 1:
    raise UserError(
      f'config.model.attention is {config.model.attention}, whose kernel sees '
      f'a whole row, and config.mesh.sequence is {config.mesh.sequence}: use '
      'attention=fused, or sequence=1'
    )
  if (
    config.model.attention == 'cudnn'
    and config.model.compute_dtype != 'bfloat16'
  ):
    raise UserError(
      'config.model.attention is cudnn, which computes in 16 bits: set '
      'config.model.compute_dtype=bfloat16, or use attention=fused'
    )


def _check_optimizer(config: Config) -> None:
  optim, prefix = config.optimizer, 'optimizer.'
  positive(optim, prefix, 'eps', 'clip_norm')
  not_negative(optim, prefix, 'weight_decay')
  known((optim.schedule,), SCHEDULES, f'{prefix}schedule')
  if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
    raise UserError(
      f'config.optimizer.betas is {optim.betas}: give two numbers from 0 up '
      'to, but not including, 1'
    )
  if not 0 <= optim.warmup_fraction <= 1:
    raise UserError(
      f'config.optimizer.warmup_fraction is {optim.warmup_fraction}: use a '
      'share of the steps between 0 and 1'
    )
  steps = config.profile_steps
  if steps and (len(steps) != 2 or not 0 < steps[0] <= steps[1]):
    raise UserError(
      f'config.profile_steps is {steps}: give the first and the last step to '
      'trace, such as (10,12), or () for none'
    )


def _check_model(model: ModelConfig) -> None:
  decoder, encoder, policy = model.decoder, model.encoder, model.policy
  for section, prefix in (
    (decoder, 'model.decoder.'),
    (encoder, 'model.encoder.'),
    (policy, 'model.policy.'),
    (model.lora, 'model.lora.'),
    (model, 'model.'),
  ):
    may_be_zero = MAY_BE_ZERO[prefix]
    numbers = [
      field.name
      for field in dataclasses.fields(section)
      if field.type in (int, float)
    ]
    positive(
      section, prefix, *(name for name in numbers if name not in may_be_zero)
    )
    not_negative(
      section, prefix, *(name for name in numbers if name in may_be_zero)
    )
  if decoder.num_heads % decoder.num_kv_heads != 0:
    raise UserError(
      f'config.model.decoder: num_heads {decoder.num_heads} is not a multiple '
      f'of num_kv_heads {decoder.num_kv_heads}: each key-value head serves '
      'equally many query heads'
    )
  if decoder.head_dim % 2 != 0:
    raise UserError(
      f'config.model.decoder.head_dim is {decoder.head_dim}: rotary positions '
      'turn pairs, use an even number'
    )
  for heads, key in (
    (encoder.num_heads, 'model.encoder.num_heads'),
    (policy.num_heads, 'model.policy.num_heads'),
  ):
    if encoder.width % heads != 0:
      raise UserError(
        f'config.{key} {heads} does not divide config.model.encoder.width '
        f'{encoder.width}: use one of {_divisors(encoder.width)}'
      )
  names(model.lora.targets, LORA_TARGETS, 'model.lora.targets')
  if model.lora.rank and not model.lora.targets:
    raise UserError(
      f'config.model.lora.rank is {model.lora.rank} and targets is empty: name '
      'the projections that get an adapter, or set rank to 0'
    )
  if not 0 <= model.lora.dropout < 1:
    raise UserError(
      f'config.model.lora.dropout is {model.lora.dropout}: use a share from 0 '
      'to less than 1'
    )
  if model.lora.rank and model.piece_length:
    raise UserError(
      'config.model.lora.rank and config.model.piece_length are both set: the '
      'baseline CEPE has no adapters; set one of them to 0'
    )
  head_dim = encoder.width // policy.num_heads
  if policy.positions and head_dim % 2 != 0:
    raise UserError(
      f'config.model.policy: width {encoder.width} in {policy.num_heads} heads '
      f'gives an odd head size {head_dim}: rotary positions turn pairs, use '
      'fewer heads or positions=false'
    )
  if decoder.rope_factor > 1 and not decoder.rope_original_length:
    raise UserError(
      f'config.model.decoder.rope_factor is {decoder.rope_factor:g}: give '
      'rope_original_length, the positions before they were stretched'
    )
  if encoder.kind == 'modernbert' and not (
    encoder.global_every and encoder.rope_theta
  ):
    raise UserError(
      "config.model.encoder: kind 'modernbert' needs global_every, "
      'local_window, rope_theta and local_rope_theta'
    )
  for value, there, key in (
    (encoder.kind, ('bert', 'modernbert'), 'model.encoder.kind'),
    (encoder.pooling, ('cls', 'mean'), 'model.encoder.pooling'),
    (model.compute_dtype, ('float32', 'bfloat16'), 'model.compute_dtype'),
    (model.remat, ('none', 'dots', 'full'), 'model.remat'),
    (model.attention, ATTENTION, 'model.attention'),
  ):
    known((value,), there, key)


def _divisors(number: int) -> str:
  """The divisors somebody would choose as a number of heads."""
  return ', '.join(str(n) for n in range(1, 65) if number % n == 0)


def _check_data(config: Config) -> None:
  data = config.data
  if not data.text:
    raise UserError('config.data.text is empty: name a text source')
  if len(data.weights) != len(data.text):
    raise UserError(
      f'config.data.weights has {len(data.weights)} entries for '
      f'{len(data.text)} entries of config.data.text: give one weight a '
      'source, or () for equal shares'
    )
  for weight in data.weights:
    if weight <= 0:
      raise UserError(
        f'config.data.weights holds {weight}: weights must be greater than 0; '
        'leave a source out of config.data.text instead'
      )
  if not 0 < data.heldout_fraction < 1:
    raise UserError(
      f'config.data.heldout_fraction is {data.heldout_fraction}: use a share '
      'of the documents between 0 and 1, such as 0.05'
    )
  for name in ('tokenizer', 'encoder_tokenizer'):
    if not getattr(data, name):
      raise UserError(
        f"config.data.{name} is empty: name 'bytes' or a tokenizer directory"
      )
  if data.max_encoder_tokens < 3:
    raise UserError(
      f'config.data.max_encoder_tokens is {data.max_encoder_tokens}: a chunk '
      'needs at least 3, two of them for the special tokens round it'
    )
  if config.model.encoder.max_length < data.max_encoder_tokens:
    raise UserError(
      f'config.model.encoder.max_length {config.model.encoder.max_length} is '
      f'less than config.data.max_encoder_tokens {data.max_encoder_tokens}: '
      'the encoder has no position for the last ones; lower the latter'
    )
  piece, most = config.model.piece_length, config.model.encoder.max_length
  if piece + 2 > most:
    raise UserError(
      f'config.model.piece_length {piece} and two special tokens are more than '
      f'config.model.encoder.max_length {most}: use {most - 2} or less'
    )


def _check_eval(config: Config) -> None:
  section = config.eval
  if config.evals:
    positive(section, 'eval.', 'num_windows', 'batch_size', 'context_windows')
  not_negative(section, 'eval.', 'tail_chunks', 'num_questions', 'num_passages')
  known(section.selectors, SELECTORS, 'eval.selectors')
  for p in section.expand_fractions:
    if not 0 <= p <= 1:
      raise UserError(
        f'config.eval.expand_fractions holds {p}: use shares from 0 to 1'
      )
  for name in LENGTHS:
    values = getattr(section, name)
    if any(value <= 0 for value in values):
      raise UserError(f'config.eval.{name} {values} must all be greater than 0')
