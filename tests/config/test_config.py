"""Config files build; impossible ones are refused with a useful sentence."""

import dataclasses
import os

import jax
import pytest

from configs import llama2_7b
from refrag_jax import cli, resolve, state
from refrag_jax.config import schema as config
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import init_params
from refrag_jax.resolve import build
from refrag_jax.runtime.environment import ROOT

CONFIGS = (
  'tiny.py',
  'tiny.py:smoke',
  'mine.py',
  'mine.py:smoke',
  'pair.py',
  'repro.py',
  'repro.py:cpu',
  'repro.py:smoke',
  'smollm2.py',
  'smollm2.py:laptop',
  'smollm2.py:cpu',
  'smollm2.py:k4',
  'smollm2.py:k16',
  'llama2_7b.py',
  'llama2_7b.py:k8',
  'llama2_7b.py:k16',
  'llama2_7b.py:k32',
  *(f'llama2_7b.py:{name}' for name in llama2_7b.PAIRS),
)


def load(name='tiny.py', *overrides):
  file = os.path.join(ROOT, 'configs', name)
  argv = [f'--config={file}', *(f'--config.{text}' for text in overrides)]
  loaded = cli.load(cli.parse(argv))
  resolve.check(loaded.config)
  return loaded


def tree(name='tiny.py'):
  """A config as nested dicts, to be spoilt."""
  return dataclasses.asdict(load(name).config)


def refused(*overrides, name='tiny.py'):
  with pytest.raises(UserError) as e:
    load(name, *overrides)
  assert '\n' not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_files_build(name):
  built = load(name).config
  assert isinstance(built, config.Config)
  assert all(stage in built.stage for stage in built.stages)


@pytest.mark.parametrize('name', sorted({c.split(':')[0] for c in CONFIGS}))
def test_config_files_open_with_their_command(name):
  text = (ROOT / 'configs' / name).read_text()
  docstring = text.split('"""')[1]
  assert f'launch/run.sh --config=configs/{name}' in docstring


def test_every_config_file_is_tested():
  there = {f.name for f in (ROOT / 'configs').glob('*.py')} - {
    'common.py',
    'xla_flags.py',
  }
  assert there == {c.split(':')[0] for c in CONFIGS}


def test_mine_has_a_toy_to_see_that_it_runs():
  """Its text, its chunks and its context stay: those are to be tried."""
  whole, toy = load('mine.py').config, load('mine.py:smoke').config
  assert toy.data == whole.data
  assert toy.model.chunk_size == whole.model.chunk_size
  assert toy.model.decoder.width == toy.model.encoder.width == 16
  assert {toy.stage[name].num_train_steps for name in toy.stages} == {2}
  assert toy.stage['cpt'].context_length == whole.stage['cpt'].context_length
  assert toy.name != whole.name  # and so its workdir


def test_built_config_is_frozen_and_typed():
  built = load('tiny.py', 'stage.cpt.peak_learning_rate=1').config
  assert isinstance(built.stage['cpt'].peak_learning_rate, float)
  assert isinstance(built.stage['cpt'].factors, tuple)
  with pytest.raises(dataclasses.FrozenInstanceError):
    built.seed = 1
  assert build(dataclasses.asdict(built)) == built


def test_empty_weights_are_equal_shares():
  built = load('tiny.py', 'data.text=a.txt,b.txt').config
  assert built.data.weights == (0.5, 0.5)


def test_tiny_decoder_is_under_a_million_parameters():
  d = load().config.model.decoder
  heads = 2 * d.num_heads + 2 * d.num_kv_heads
  layer = d.width * (heads * d.head_dim + 3 * d.mlp_width + 2)
  total = d.vocab_size * d.width + d.num_layers * layer + d.width
  assert total < 1e6


# Parameters in millions, of the models' cards or by their config.json; RoBERTa's
# pooler (1.05) and the others' (0.15) left out.
MILLIONS = {
  'k16': (6738.4, 354.3),
  'roberta_base': (6738.4, 124.06),
  'llama2_13b': (13015.9, 354.3),
  'llama31_8b': (8030.3, 354.3),
  'llama32_3b_bge_small': (3212.7, 33.21),
  'smollm2_135m': (134.5, 22.57),
}


@pytest.mark.parametrize('preset', MILLIONS)
def test_the_models_of_the_paper_have_their_size(preset):
  model = load(f'llama2_7b.py:{preset}').config.model
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  decoder, encoder = MILLIONS[preset]
  assert state.count(shapes['decoder']) / 1e6 == pytest.approx(
    decoder, abs=0.05
  )
  assert state.count(shapes['encoder']) / 1e6 == pytest.approx(
    encoder, abs=0.05
  )
  if preset == 'k16':  # 1024 to 4096 to 4096, with biases
    size = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert state.count(shapes['projection']) == size == 20_979_712


def test_llama2_7b_has_the_papers_sizes():
  built = load('llama2_7b.py').config
  d = built.model.decoder
  layer = d.width * (4 * d.num_heads * d.head_dim + 3 * d.mlp_width + 2)
  total = 2 * d.vocab_size * d.width + d.num_layers * layer + d.width
  assert total == 6_738_415_616  # LLaMA-2-7B
  assert built.stage['reconstruct'].num_train_steps == 78_125
  assert [built.stage[s].peak_learning_rate for s in built.stages[:2]] == [
    2e-4,
    5e-5,
  ]


@pytest.mark.parametrize(
  ('fraction', 'chunks', 'expected'),
  [
    (1 / 15, 128, 8),  # paper, Table 13: rate 8.258
    (1 / 15, 256, 17),  # rate 8.0157
    (0.1, 8, 0),
    (0.29, 100, 29),  # 28.999... in floats
    (0.25, 8, 2),
  ],
)
def test_expanded_chunks_is_the_floor(fraction, chunks, expected):
  assert config.expanded_chunks(fraction, chunks) == expected


def test_unknown_and_missing_keys():
  values = tree()
  values['model']['decoder']['hiden'] = 3
  with pytest.raises(UserError, match='unknown config key'):
    build(values)
  values = tree()
  del values['stage']['cpt']['batch_size']
  with pytest.raises(UserError, match=r'cpt.batch_size is missing'):
    build(values)
  values = tree()
  values['model']['decoder'] = 3
  with pytest.raises(UserError, match=r'model.decoder must be'):
    build(values)


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    (('seed',), 1.5),
    (('seed',), True),
    (('seed',), '1'),
    (('name',), 3),
    (('tensorboard',), 1),
    (('stages',), 'lm'),
    (('model', 'decoder', 'rope_theta'), float('nan')),
    (('stage', 'cpt', 'factors'), (1, 'two')),
    (('stage', 'cpt', 'peak_learning_rate'), None),
    (('mesh',), None),
  ],
)
def test_wrong_types_are_refused(path, value):
  values = tree()
  node = values
  for name in path[:-1]:
    node = node[name]
  node[path[-1]] = value
  with pytest.raises(UserError) as e:
    build(values)
  assert '.'.join(path) in str(e.value)


# Each override, and what the message must name: the culprit and a way out.
BAD = [
  ('stages=lm,recontruct', ('recontruct', 'reconstruct')),
  ('stages=lm,lm', ('lm', 'twice')),
  ('evals=qb', ('evals', 'qa')),
  ('seed=-1', ('seed', '0 or greater')),
  ('log_every_steps=0', ('log_every_steps', 'greater than 0')),
  ('checkpoint_every_seconds=-1', ('checkpoint_every_seconds',)),
  ('mesh.fsdp=0', ('mesh.fsdp', '1 or more')),
  ('mesh.fsdp=-1', ('data and fsdp', 'only one')),
  ('model.chunk_size=7', ('64', '7', 'use 63 or 70')),
  ('model.chunk_size=0', ('chunk_size', 'greater than 0')),
  ('model.decoder.num_kv_heads=3', ('num_heads 4', 'num_kv_heads 3')),
  ('model.decoder.head_dim=33', ('head_dim', 'even')),
  ('model.decoder.num_layers=0', ('num_layers', 'greater than 0')),
  ('model.encoder.num_heads=3', ('encoder.num_heads', '2, 4, 8')),
  ('model.policy.num_heads=5', ('policy.num_heads', '128')),
  ('model.policy.num_heads=128', ('odd head size 1',)),
  ('model.encoder.pooling=max', ('pooling', 'cls')),
  ('model.compute_dtype=bf16', ('compute_dtype', 'bfloat16')),
  ('model.remat=some', ('remat', 'none')),
  ('model.attention=quick', ('attention', 'blockwise', 'fused')),
  ('model.attention=cudnn', ('16 bits', 'compute_dtype=bfloat16')),
  ('cluster.join_seconds=0', ('cluster.join_seconds', 'greater than 0')),
  ('cluster.hang_seconds=-1.0', ('cluster.hang_seconds',)),
  ('model.loss_block=-1', ('loss_block', '0 or greater')),
  ('model.piece_length=-1', ('piece_length', '0 or greater')),
  ('model.piece_length=63', ('max_length 64', 'use 62 or less')),
  ('model.piece_length=24', ('cpt.context_length 64', 'use 48 or 72')),
  ('data.text=()', ('data.text', 'empty')),
  ('data.weights=0.5,0.5', ('weights', '2 entries for 1')),
  ('data.weights=0', ('weights', 'greater than 0')),
  ('data.heldout_fraction=0', ('heldout_fraction', 'between 0 and 1')),
  ('data.heldout_fraction=1', ('heldout_fraction', 'between 0 and 1')),
  ('data.tokenizer=', ('data.tokenizer', 'bytes')),
  ('data.max_encoder_tokens=2', ('max_encoder_tokens', '3')),
  ('data.max_encoder_tokens=65', ('max_length 64', '65')),
  ('data.question_template=x', ('{question}',)),
  ('data.passage_template=x', ('{text}',)),
  ('data.questions=', ('data.questions', 'stdlib')),
  ('data.num_passages=0', ('num_passages',)),
  ('stage.lm.output_length=0', ('lm.output_length',)),
  ('stage.lm.periodic_fraction=1.1', ('periodic_fraction',)),
  ('stage.cpt.num_train_steps=0', ('cpt.num_train_steps',)),
  ('stage.cpt.peak_learning_rate=-1', ('cpt.peak_learning_rate',)),
  ('stage.cpt.accumulation_steps=3', ('64', 'accumulation_steps 3')),
  ('stage.cpt.context_length=0', ('cpt.context_length',)),
  ('stage.cpt.output_length=0', ('cpt.output_length',)),
  ('stage.cpt.factors=16,32', ('factors', '= 8', 'smaller')),
  ('stage.cpt.factors=0,1', ('factors', '1 or more')),
  ('stage.cpt.factors=2,1', ('factors', 'ascending')),
  ('stage.cpt.factors=1,3', ('factors', 'Table 8')),
  ('stage.mixed.expand_fractions=()', ('mixed.expand_fractions', 'empty')),
  ('stage.mixed.expand_fractions=0.1', ('0.125', '10 chunks')),
  ('stage.mixed.expand_fractions=1', ('between 0 and 1',)),
  ('stage.mixed.factors=1,2,4,8', ('of 1 chunks', 'no factors')),
  ('stage.grpo.expand_fractions=0.1', ('grpo', '0.125')),
  ('stage.grpo.expand_fractions=.2,.3,.4,.5,.6', ('at most 4',)),
  ('stage.grpo.num_generations=1', ('num_generations', '2 or more')),
  ('stage.grpo.clip_eps=0', ('clip_eps',)),
  ('stage.grpo.updates_per_rollout=0', ('updates_per_rollout',)),
  ('stage.cpt.updates_per_rollout=2', ('cpt.updates_per', 'grpo alone')),
  ('init_from=@lm', ("config.init_from is '@lm'", '@RUN/STAGE')),
  ('init_from=@a/b/c', ("'@a/b/c'", '@RUN/STAGE')),
  ('init_from=@', ('@RUN/STAGE',)),
  ('init_from=@/lm', ('@RUN/STAGE',)),
  ('init_from=@../lm', ('@RUN/STAGE',)),
  ('stage.cpt.init_from=@a/', ('config.stage.cpt.init_from', '@RUN/STAGE')),
  ('stage.cpt.init_from=@a/cpd', ('stage.cpt.init_from', "mean 'cpt'")),
  ('stage.cpt_trained.contexts=()', ('contexts', 'last_k')),
  ('stage.cpt_trained.contexts=all', ('contexts', 'all')),
  ('stage.sft_full.contexts=last_k', ('contexts', 'last_k')),
  # Positions: lm 128 here, reconstruct 1 + 8 + 63, sft_full 88 + 256 + 39.
  ('model.decoder.max_length=127', ('stage.lm', 'up to 128', 'has 127')),
  ('model.decoder.max_length=382', ('stage.sft_full', 'up to 383')),
  ('eval.num_windows=0', ('num_windows',)),
  ('eval.selectors=rll', ('selectors', 'rl')),
  ('eval.selectors=()', ('selectors', 'empty')),
  ('eval.expand_fractions=1.5', ('expand_fractions', 'from 0 to 1')),
  ('eval.output_lengths=0', ('output_lengths',)),
  ('eval.reconstruct_lengths=65', ('reconstruct_lengths', '64')),
  ('eval.tail_chunks=-1', ('tail_chunks',)),
  ('eval.num_questions=0', ('num_questions',)),
  ('eval.question_passages=0', ('question_passages', '1 or more')),
  ('eval.question_fractions=1.5', ('question_fractions', 'between 0 and 1')),
  ('data.question_weights=1,2', ('question_weights', '2 entries for 1')),
  ('data.question_weights=0', ('question_weights', 'greater than 0')),
  ('data.history_chunks=-1', ('history_chunks', '0 or greater')),
  ('model.lora.dropout=1', ('lora.dropout', 'less than 1')),
  ('eval.copy_lengths=0', ('copy_lengths', 'greater than 0')),
  ('eval.context_lengths=-8', ('context_lengths', 'greater than 0')),
  ('eval.num_passages=-1', ('num_passages', '0 or greater')),
  ('stage.reconstruct.encoder_init=x', ('encoder_init', 'decoder_embeddings')),
]


@pytest.mark.parametrize(('override', 'parts'), BAD, ids=[b[0] for b in BAD])
def test_impossible_combinations_are_refused(override, parts):
  message = refused(override)
  assert message.startswith('config.') or message.startswith('unknown')
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  ('name', 'override', 'parts'),
  [
    ('copying', 'copy_lengths=()', ("'copying'", 'empty')),
    ('context_length', 'context_lengths=8,12', ('(8, 12)', 'multiple', '8')),
    ('context_length', 'output_lengths=()', ("'context_length'", 'empty')),
    ('passages', 'num_passages=1', ('2 or more', '0 skips')),
    ('passages', 'num_passages=9', ('8 chunks',)),
    ('passages', 'expand_fractions=()', ("'passages'", 'empty')),
    ('details', 'reconstruct_lengths=()', ("'details'", 'empty')),
    ('details', 'reconstruct_lengths=12', ('(12,)', 'multiple')),
  ],
)
def test_what_an_eval_needs(name, override, parts):
  message = refused(f'evals={name}', f'eval.{override}')
  assert message.startswith('config.eval.')
  for part in parts:
    assert part in message
  # Who does not run it need not care.
  load('tiny.py', 'evals=()', f'eval.{override}')


def test_factors_above_the_context_are_dropped():
  built = load('tiny.py', 'stage.cpt.factors=1,2,4,8,16,32').config
  assert config.context_chunks(built.stage['cpt'], 8) == (1, 2, 4, 8)
  stage = dataclasses.replace(built.stage['cpt'], factors=())
  assert config.context_chunks(stage, 8) == (8,)


def test_a_config_saved_before_a_setting_came_in_is_read():
  values = tree()
  del values['bench']['llama_cpp']
  assert build(values).bench.llama_cpp == ''
  del values['bench']['repeats']
  with pytest.raises(UserError, match=r'config.bench.repeats is missing'):
    build(values)


def test_a_stage_that_does_not_run_may_be_unfinished():
  built = load('tiny.py', 'stages=lm', 'evals=()', 'stage.grpo.clip_eps=0')
  assert built.config.stage['grpo'].clip_eps == 0


def test_a_stage_without_fields_is_named():
  values = tree()
  del values['stage']['mixed']
  with pytest.raises(UserError, match=r'config.stage.mixed is missing'):
    build(values)
