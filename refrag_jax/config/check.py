"""Refuses configs that cannot work, before anything is allocated.

What needs the tokenizer (vocabulary) or the devices (the mesh) is checked when
they are known, in session.py.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

from refrag_jax.config import typed
from refrag_jax.config.schema import (
  Config,
  ModelConfig,
  StageConfig,
  context_chunks,
  expanded_chunks,
)
from refrag_jax.errors import UserError

STAGES = (
  'lm',
  'mlm',
  'reconstruct',
  'cpt',
  'mixed',
  'grpo',
  'sft',
  'cpt_trained',
  'mixed_trained',
  'sft_full',
  'sft_none',
  'reconstruct_unfrozen',
  'cpt_frozen',
  'cepe_warmup',
  'cepe',
  'cepe_unfrozen',
)
EVALS = (
  'log_perplexity',
  'reconstruction',
  'regeneration',
  'selection',
  'qa',
  'copying',
  'context_length',
  'passages',
  'details',
)
# The stage whose context length an eval's windows have.
EVAL_STAGE = {
  'log_perplexity': 'cpt',
  'details': 'cpt',
  'context_length': 'cpt',
  'selection': 'mixed',
  'passages': 'mixed',
}
RECONSTRUCTIONS = ('reconstruction', 'regeneration', 'details')
SELECTORS = ('rl', 'ppl_desc', 'ppl_asc', 'random', 'last', 'oracle')
CONTEXTS = ('none', 'last_k', 'full')
KERNELS = ('cudnn', 'splash')
ATTENTION = ('dense', 'blockwise', *KERNELS, 'fused')
# The stages by what they use: windows of text, chunks left as tokens,
# another context than chunks, questions, pieces in place of chunks.
WINDOWS = (
  'mlm',
  'reconstruct',
  'cpt',
  'mixed',
  'grpo',
  'cpt_trained',
  'mixed_trained',
  'reconstruct_unfrozen',
  'cpt_frozen',
  'cepe_warmup',
  'cepe',
  'cepe_unfrozen',
)
RECONSTRUCTS = ('reconstruct', 'reconstruct_unfrozen')
REGENERATES = (*RECONSTRUCTS, 'cepe_warmup')
EXPANDS = ('mixed', 'grpo')
CONTROLS = ('cpt_trained', 'mixed_trained', 'sft_full', 'sft_none')
QUESTIONS = ('sft', 'sft_full', 'sft_none')
ENCODER_INIT = 'decoder_embeddings'
IMPORTED = 'imported'  # what --mode=import writes, beside the stages
PIECES = ('cepe_warmup', 'cepe', 'cepe_unfrozen')
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
}
# Each p is a shape of its own and so a compilation of `grpo`'s step.
MAX_GRPO_FRACTIONS = 4
TABLE8_FACTORS = tuple(2**i for i in range(9))


def check(config: Config) -> None:
  """Refuses what cannot work, before anything is allocated."""
  _validate_run(config)
  _validate_model(config.model)
  _validate_data(config)
  _validate_pieces(config)
  for name in config.stages:
    _validate_stage(name, config)
    _validate_positions(name, config)
  _validate_eval(config)


def stage_beside(source: str, key: str) -> tuple[str, str]:
  """(run, stage) of '@RUN/STAGE': a stage of the workdir RUN beside this one.

  Args:
    source: what the config says.
    key: where it says it, for the message.
  """
  run, _, stage = source.removeprefix('@').partition('/')
  _refuse(
    run in ('', '.', '..') or not stage or '/' in stage,
    f'config.{key} is {source!r}: write @RUN/STAGE, such as @main/lm, for a '
    'stage of the workdir RUN beside this one; other checkpoints by their path',
  )
  _known((stage,), (*STAGES, IMPORTED), key)
  return run, stage


def _refuse(problem: bool, message: str) -> None:
  if problem:
    raise UserError(message)


def _positive(section: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(section, name)
    _refuse(
      value <= 0,
      f'config.{prefix}{name} is {value}: it must be greater than 0',
    )


def _not_negative(section: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(section, name)
    _refuse(
      value < 0,
      f'config.{prefix}{name} is {value}: it must be 0 or greater',
    )


def _known(values: Sequence[str], known: Collection[str], key: str) -> None:
  for value in values:
    hint = f'; there are {", ".join(known)}'
    if len(known) > 4:
      hint = typed.did_you_mean(value, known) or hint
    _refuse(value not in known, f'config.{key}: there is no {value!r}{hint}')


def _validate_run(config: Config) -> None:
  _known(config.stages, STAGES, 'stages')
  _known(config.evals, EVALS, 'evals')
  for names, key in ((config.stages, 'stages'), (config.evals, 'evals')):
    double = [name for name in names if names.count(name) > 1]
    _refuse(
      bool(double),
      f'config.{key} names {double[0] if double else ""!r} twice: delete one',
    )
  for name in config.stages:
    _refuse(
      name not in config.stage,
      f'config.stages names {name!r}, but config.stage.{name} is missing: add '
      'it to the config file',
    )
  for name in RECONSTRUCTS:
    before = config.stages[: _index(config.stages, name)]
    _refuse(
      'mlm' in before and not config.stage[name].init_from,
      f'config.stages has mlm before {name}, which would start from lm all '
      f'the same: set config.stage.{name}.init_from to @RUN/mlm, RUN being '
      "the workdir's last name, or to WORKDIR/checkpoints/mlm",
    )
  starts = {'init_from': config.init_from} | {
    f'stage.{name}.init_from': config.stage[name].init_from
    for name in config.stages
  }
  for key, source in starts.items():
    if source.startswith('@'):
      stage_beside(source, key)
  _not_negative(config, '', 'seed')
  _positive(config, '', 'log_every_steps')
  _not_negative(
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
  _refuse(
    len(free) > 1,
    f'config.mesh: {" and ".join(free)} are both -1, but only one axis can '
    'take the devices that the others leave: give the other one a size',
  )
  for field in dataclasses.fields(config.mesh):
    size = getattr(config.mesh, field.name)
    _refuse(
      size < 1 and size != -1,
      f'config.mesh.{field.name} is {size}: use 1 or more, or -1 for the '
      'devices that the other axes leave',
    )
  _positive(config.cluster, 'cluster.', 'join_seconds', 'heartbeat_seconds')
  _not_negative(config.cluster, 'cluster.', 'hang_seconds')
  kernel = config.model.attention in KERNELS
  _refuse(
    kernel and config.mesh.sequence != 1,
    f'config.model.attention is {config.model.attention}, whose kernel sees a '
    f'whole row, and config.mesh.sequence is {config.mesh.sequence}: use '
    'attention=fused, or sequence=1',
  )
  _refuse(
    config.model.attention == 'cudnn'
    and config.model.compute_dtype != 'bfloat16',
    'config.model.attention is cudnn, which computes in 16 bits: set '
    'config.model.compute_dtype=bfloat16, or use attention=fused',
  )


def _index(names: Sequence[str], name: str) -> int:
  """Where a name stands; 0 if it does not."""
  return names.index(name) if name in names else 0


def _validate_model(model: ModelConfig) -> None:
  decoder, encoder, policy = model.decoder, model.encoder, model.policy
  for section, prefix in (
    (decoder, 'model.decoder.'),
    (encoder, 'model.encoder.'),
    (policy, 'model.policy.'),
    (model, 'model.'),
  ):
    may_be_zero = MAY_BE_ZERO[prefix]
    numbers = [
      field.name
      for field in dataclasses.fields(section)
      if field.type in (int, float)
    ]
    _positive(
      section, prefix, *(name for name in numbers if name not in may_be_zero)
    )
    _not_negative(
      section, prefix, *(name for name in numbers if name in may_be_zero)
    )
  _refuse(
    decoder.num_heads % decoder.num_kv_heads != 0,
    f'config.model.decoder: num_heads {decoder.num_heads} is not a multiple '
    f'of num_kv_heads {decoder.num_kv_heads}: each key-value head serves '
    'equally many query heads',
  )
  _refuse(
    decoder.head_dim % 2 != 0,
    f'config.model.decoder.head_dim is {decoder.head_dim}: rotary positions '
    'turn pairs, use an even number',
  )
  for heads, key in (
    (encoder.num_heads, 'model.encoder.num_heads'),
    (policy.num_heads, 'model.policy.num_heads'),
  ):
    _refuse(
      encoder.width % heads != 0,
      f'config.{key} {heads} does not divide config.model.encoder.width '
      f'{encoder.width}: use one of {_divisors(encoder.width)}',
    )
  head_dim = encoder.width // policy.num_heads
  _refuse(
    policy.positions and head_dim % 2 != 0,
    f'config.model.policy: width {encoder.width} in {policy.num_heads} heads '
    f'gives an odd head size {head_dim}: rotary positions turn pairs, use '
    'fewer heads or positions=false',
  )
  _refuse(
    decoder.rope_factor > 1 and not decoder.rope_original_length,
    f'config.model.decoder.rope_factor is {decoder.rope_factor:g}: give '
    'rope_original_length, the positions before they were stretched',
  )
  _refuse(
    encoder.kind == 'modernbert'
    and not (encoder.global_every and encoder.rope_theta),
    "config.model.encoder: kind 'modernbert' needs global_every, local_window, "
    'rope_theta and local_rope_theta',
  )
  for value, known, key in (
    (encoder.kind, ('bert', 'modernbert'), 'model.encoder.kind'),
    (encoder.pooling, ('cls', 'mean'), 'model.encoder.pooling'),
    (model.compute_dtype, ('float32', 'bfloat16'), 'model.compute_dtype'),
    (model.remat, ('none', 'dots', 'full'), 'model.remat'),
    (model.attention, ATTENTION, 'model.attention'),
  ):
    _known((value,), known, key)


def _divisors(number: int) -> str:
  """The divisors somebody would choose as a number of heads."""
  return ', '.join(str(n) for n in range(1, 65) if number % n == 0)


def asks_questions(config: Config) -> bool:
  """Whether data.questions is read."""
  return 'qa' in config.evals or bool({*QUESTIONS} & {*config.stages})


def _validate_data(config: Config) -> None:
  data = config.data
  _refuse(not data.text, 'config.data.text is empty: name a text source')
  _refuse(
    len(data.weights) != len(data.text),
    f'config.data.weights has {len(data.weights)} entries for '
    f'{len(data.text)} entries of config.data.text: give one weight a source, '
    'or () for equal shares',
  )
  for weight in data.weights:
    _refuse(
      weight <= 0,
      f'config.data.weights holds {weight}: weights must be greater than 0; '
      'leave a source out of config.data.text instead',
    )
  _refuse(
    not 0 < data.heldout_fraction < 1,
    f'config.data.heldout_fraction is {data.heldout_fraction}: use a share of '
    'the documents between 0 and 1, such as 0.05',
  )
  for name in ('tokenizer', 'encoder_tokenizer'):
    _refuse(
      not getattr(data, name),
      f"config.data.{name} is empty: name 'bytes' or a tokenizer directory",
    )
  _refuse(
    data.max_encoder_tokens < 3,
    f'config.data.max_encoder_tokens is {data.max_encoder_tokens}: a chunk '
    'needs at least 3, two of them for the special tokens round it',
  )
  _refuse(
    config.model.encoder.max_length < data.max_encoder_tokens,
    f'config.model.encoder.max_length {config.model.encoder.max_length} is '
    f'less than config.data.max_encoder_tokens {data.max_encoder_tokens}: '
    'the encoder has no position for the last ones; lower the latter',
  )
  if not asks_questions(config):
    return
  _refuse(
    not data.questions,
    "config.data.questions is empty: name 'stdlib' or a JSONL file, or take "
    "the sft stages and the eval 'qa' out",
  )
  _positive(
    data,
    'data.',
    'num_passages',
    'question_length',
    'passage_chunks',
    'answer_length',
  )
  for template, field in (
    ('question_template', '{question}'),
    ('passage_template', '{text}'),
  ):
    _refuse(
      field not in getattr(data, template),
      f'config.data.{template} {getattr(data, template)!r} does not contain '
      f'{field}: put it where the text belongs',
    )


def _validate_pieces(config: Config) -> None:
  """The baseline CEPE: pieces that the encoder can read, contexts of them."""
  piece, most = config.model.piece_length, config.model.encoder.max_length
  readers = [name for name in config.stages if name in PIECES]
  _refuse(
    bool(readers) and not piece,
    f'config.model.piece_length is 0, but {" and ".join(readers)} read pieces '
    'of so many tokens: set it, such as 256 (CEPE), or take the stages out',
  )
  _refuse(
    piece + 2 > most,
    f'config.model.piece_length {piece} and two special tokens are more than '
    f'config.model.encoder.max_length {most}: use {most - 2} or less',
  )
  if 'log_perplexity' in config.evals and 'cpt' in config.stage:
    readers.append('cpt')  # the eval's windows are of its length
  for name in readers if piece else ():
    s = config.stage[name].context_length
    _refuse(
      s % piece != 0,
      f'config.stage.{name}.context_length {s} is not a multiple of '
      f'config.model.piece_length {piece}: use {max(s // piece, 1) * piece} or '
      f'{(s // piece + 1) * piece}',
    )


def _validate_positions(name: str, config: Config) -> None:
  """Refuses a sequence beyond the positions that a decoder was made with."""
  limit, longest = config.model.decoder.max_length, _longest(name, config)
  _refuse(
    0 < limit < longest,
    f'config.stage.{name} makes sequences of up to {longest} positions, and '
    f'the decoder has {limit} (config.model.decoder.max_length): shorten '
    'context_length, output_length or what questions bring',
  )


def _longest(name: str, config: Config) -> int:
  """Positions of the decoder's longest sequence in a stage.

  The last token of an output is predicted and not read (splice.num_positions).
  """
  stage, data, k = config.stage[name], config.data, config.model.chunk_size
  if name in ('lm', 'mlm'):
    return stage.output_length
  if name in QUESTIONS:
    chunks = data.num_passages * data.passage_chunks
    context = {'sft': chunks, 'sft_full': chunks * k, 'sft_none': 0}[name]
    return data.question_length + context + data.answer_length - 1
  chunks = stage.context_length // k
  fractions = stage.expand_fractions if name in EXPANDS else ()
  expanded = max((expanded_chunks(p, chunks) for p in fractions), default=0)
  context = chunks + expanded * (k - 1)
  if name in CONTROLS and 'full' in stage.contexts:
    context = stage.context_length
  if name in PIECES:
    context = 0
  regenerates = name in REGENERATES
  output = stage.context_length if regenerates else stage.output_length
  return context + output  # BOS stands before, the last output is not read


def _validate_stage(name: str, config: Config) -> None:
  stage, prefix = config.stage[name], f'stage.{name}.'
  _positive(
    stage,
    prefix,
    'num_train_steps',
    'batch_size',
    'accumulation_steps',
    'peak_learning_rate',
  )
  _refuse(
    stage.batch_size % stage.accumulation_steps != 0,
    f'config.{prefix}batch_size {stage.batch_size} is not a multiple of '
    f'accumulation_steps {stage.accumulation_steps}: the parts of a step have '
    'equal size',
  )
  if name == 'lm':
    _positive(stage, prefix, 'output_length')
    _refuse(
      not 0 <= stage.periodic_fraction <= 1,
      f'config.{prefix}periodic_fraction is {stage.periodic_fraction}: use a '
      'share of the windows between 0 and 1',
    )
  if name in WINDOWS:
    _validate_context(stage, prefix, config.model.chunk_size)
    # The others predict their context itself.
    if name not in ('mlm', *REGENERATES):
      _positive(stage, prefix, 'output_length')
  if name in EXPANDS:
    _validate_fractions(stage, prefix, config.model.chunk_size)
  _validate_encoder_init(stage, prefix, config)
  if name in CONTROLS:
    _validate_control(name, stage, prefix)
  _refuse(
    name != 'grpo' and stage.updates_per_rollout > 1,
    f'config.{prefix}updates_per_rollout is {stage.updates_per_rollout}: '
    f'rollouts are of grpo alone, and {name} makes one update a step; use 0',
  )
  _refuse(
    name in PIECES and bool(stage.factors),
    f'config.{prefix}factors is {stage.factors}: CEPE has no curriculum and '
    'reads whole pieces, use ()',
  )
  if name == 'grpo':
    _validate_grpo(stage, prefix)


def _validate_encoder_init(
  stage: StageConfig, prefix: str, config: Config
) -> None:
  key, start = f'config.{prefix}encoder_init', stage.encoder_init
  _refuse(
    start not in ('', ENCODER_INIT),
    f"{key}: there is no {start!r}; use '' for random or {ENCODER_INIT!r}",
  )
  decoder, encoder = config.model.decoder, config.model.encoder
  of_decoder = decoder.width, decoder.vocab_size, config.data.tokenizer
  of_encoder = encoder.width, encoder.vocab_size, config.data.encoder_tokenizer
  _refuse(
    start == ENCODER_INIT and of_decoder != of_encoder,
    f'{key}: {start!r} needs equal width, vocab_size and tokenizer, but the '
    f'decoder has {of_decoder} and the encoder {of_encoder}: make them equal '
    "or use ''",
  )


def _validate_control(name: str, stage: StageConfig, prefix: str) -> None:
  # Passages end in ragged chunks, of which "as many last tokens as chunks" is
  # not defined.
  known = [c for c in CONTEXTS if name not in QUESTIONS or c != 'last_k']
  _refuse(
    not stage.contexts,
    f'config.{prefix}contexts is empty: name at least one of '
    f'{", ".join(known)}',
  )
  _known(stage.contexts, known, f'{prefix}contexts')


def _validate_grpo(stage: StageConfig, prefix: str) -> None:
  _refuse(
    len(stage.expand_fractions) > MAX_GRPO_FRACTIONS,
    f'config.{prefix}expand_fractions has {len(stage.expand_fractions)} '
    f'values: use at most {MAX_GRPO_FRACTIONS}, each is compiled on its own',
  )
  _refuse(
    stage.num_generations < 2,
    f'config.{prefix}num_generations is {stage.num_generations}: an advantage '
    'compares the samples of a group, use 2 or more, such as 8',
  )
  _positive(stage, prefix, 'clip_eps', 'updates_per_rollout')


def _validate_context(stage: StageConfig, prefix: str, k: int) -> None:
  _positive(stage, prefix, 'context_length')
  s = stage.context_length
  _refuse(
    s % k != 0,
    f'config.{prefix}context_length {s} is not a multiple of '
    f'config.model.chunk_size {k}: use {max(s // k, 1) * k} or '
    f'{(s // k + 1) * k}',
  )
  for factor in stage.factors:
    _refuse(
      factor < 1,
      f'config.{prefix}factors holds {factor}: factors are counts of chunks, '
      '1 or more',
    )
  _refuse(
    stage.factors != tuple(sorted(set(stage.factors))),
    f'config.{prefix}factors {stage.factors}: give each once, ascending',
  )
  unknown = [f for f in stage.factors if f not in TABLE8_FACTORS]
  _refuse(
    len(stage.factors) > 1 and bool(unknown),
    f'config.{prefix}factors holds {unknown[:1]}: a curriculum weighs the '
    f'factors of Table 8, {TABLE8_FACTORS}',
  )
  fits = [factor for factor in stage.factors if factor <= s // k]
  _refuse(
    bool(stage.factors) and not fits,
    f'config.{prefix}factors {stage.factors} are all above '
    f'context_length / chunk_size = {s // k}: add a smaller one',
  )


def _validate_fractions(stage: StageConfig, prefix: str, k: int) -> None:
  """0 < floor(p L) < L: with none or all there is nothing to choose."""
  key = f'config.{prefix}expand_fractions'
  _refuse(
    not stage.expand_fractions,
    f'{key} is empty: name the share p of chunks to expand, such as (0.1,)',
  )
  for p in stage.expand_fractions:
    _refuse(not 0 < p < 1, f'{key} holds {p}: use shares between 0 and 1')
    for chunks in context_chunks(stage, k):
      expanded = expanded_chunks(p, chunks)
      fewest = math.ceil(1 / p - 1e-9)
      ways = [f'at least {fewest} chunks (context_length {fewest * k})']
      if chunks > 1:
        ways.insert(0, f'p of {_round_up(1 / chunks)} or more')
      if stage.factors:
        ways.append('no factors')
      _refuse(
        expanded == 0,
        f'{key}: p = {p:g} of {chunks} chunks expands none of them '
        f'(floor(p L) = 0): use {", or ".join(ways)}',
      )


def _round_up(p: float) -> float:
  """The least p of three decimals that is not below `p`, for a message."""
  return math.ceil(p * 1000 - 1e-9) / 1000


def _validate_eval(config: Config) -> None:
  section = config.eval
  if config.evals:
    _positive(section, 'eval.', 'num_windows', 'batch_size', 'context_windows')
  for name in config.evals:
    stage = EVAL_STAGE.get(name)
    _refuse(
      stage is not None and stage not in config.stage,
      f'config.evals names {name}, whose windows are those of '
      f'config.stage.{stage}, which is missing: add it to the config file, or '
      'take the eval out',
    )
  if 'qa' in config.evals:
    _positive(section, 'eval.', 'num_questions')
  _not_negative(
    section, 'eval.', 'tail_chunks', 'num_questions', 'num_passages'
  )
  _known(section.selectors, SELECTORS, 'eval.selectors')
  for p in section.expand_fractions:
    _refuse(
      not 0 <= p <= 1,
      f'config.eval.expand_fractions holds {p}: use shares from 0 to 1',
    )
  for name, readers in (
    (
      'output_lengths',
      ('log_perplexity', 'selection', 'context_length', 'passages', 'details'),
    ),
    ('reconstruct_lengths', RECONSTRUCTIONS),
    ('expand_fractions', ('selection', 'passages')),
    ('selectors', ('selection', 'passages')),
    ('copy_lengths', ('copying',)),
    ('context_lengths', ()),
  ):
    values = getattr(section, name)
    needed = [reader for reader in readers if reader in config.evals]
    _refuse(
      bool(needed) and not values,
      f'config.eval.{name} is empty: the eval {"".join(needed[:1])!r} '
      'needs at least one',
    )
    _refuse(
      name.endswith('lengths') and any(value <= 0 for value in values),
      f'config.eval.{name} {values} must all be greater than 0',
    )
  reconstructs = set(RECONSTRUCTIONS) & set(config.evals)
  for name in RECONSTRUCTS if reconstructs else ():
    if name in config.stage:
      longest = config.stage[name].context_length
      _refuse(
        max(section.reconstruct_lengths) > longest,
        f'config.eval.reconstruct_lengths {section.reconstruct_lengths}: '
        f'config.stage.{name}.context_length has only {longest} tokens',
      )
  k = config.model.chunk_size
  for name, reads in (
    ('reconstruct_lengths', bool(reconstructs)),
    ('context_lengths', 'context_length' in config.evals),
  ):
    values = getattr(section, name)
    _refuse(
      reads and any(n % k for n in values),
      f'config.eval.{name} {values}: each must be a multiple of '
      f'config.model.chunk_size {k}',
    )
  if 'passages' in config.evals and 'mixed' in config.stage:
    chunks = config.stage['mixed'].context_length // k
    _refuse(
      section.num_passages == 1 or 0 < chunks < section.num_passages,
      f'config.eval.num_passages is {section.num_passages}: use 2 or more, one '
      f'of them useful, and no more than the {chunks} chunks of '
      'config.stage.mixed.context_length; 0 skips the eval',
    )
  if 'selection' in config.evals and 'mixed' in config.stage:
    chunks = config.stage['mixed'].context_length // config.model.chunk_size
    _refuse(
      0 < chunks <= section.tail_chunks,
      f'config.eval.tail_chunks {section.tail_chunks} leaves nothing of the '
      f'{chunks} chunks of config.stage.mixed.context_length: use fewer',
    )
