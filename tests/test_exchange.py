"""`--mode=import` and `--mode=export`: there and back, and what is refused."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers
import toy_config
import toy_run

from refrag_jax import (
  checkpoint,
  convert_hf,
  evaluate,
  exchange,
  hf_families,
  main,
  pretrained,
  session,
  train,
)
from refrag_jax.data import tokenizers
from refrag_jax.environment import ROOT
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import init_params


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return toy_config.write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def cfg(folder):
  return toy_run.config(
    folder, stages=('reconstruct',), evals=('reconstruction',),
    stage__reconstruct__num_train_steps=2, model__decoder__max_length=64,
  )  # fmt: skip


@pytest.fixture(scope='module')
def models(cfg, tmp_path_factory):
  """Directories of a decoder and an encoder for that config, and their params."""
  folder = tmp_path_factory.mktemp('models')
  params = init_params(cfg.model, jax.random.key(7))
  for group, to_json in (
    ('decoder', hf_families.decoder_json), ('encoder', hf_families.encoder_json)
  ):  # fmt: skip
    os.makedirs(folder / group)
    values = to_json(getattr(cfg.model, group))
    convert_hf.write_params(
      str(folder / group), group, params[group], values, np.float32
    )
  return str(folder), params


def both(models):
  return f'{models[0]}/decoder,{models[0]}/encoder'


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def run(cfg, models, tmp_path_factory):
  """A run that starts straight from these directories: two steps."""
  workdir = str(tmp_path_factory.mktemp('run'))
  started = toy_run.replaced(cfg, init_from=both(models))
  train.run(started, workdir)
  return started, workdir


def test_a_run_starts_from_directories(cfg, models, run):
  started, workdir = run
  meta = checkpoint.read_meta(f'{workdir}/checkpoints/reconstruct')
  assert meta['trained'] == ['decoder', 'encoder', 'projection']
  opened = session.open_model(started)
  params, groups = session.load_params(
    opened, f'{workdir}/checkpoints/reconstruct', 'test'
  )
  assert set(groups) == {'decoder', 'encoder', 'projection'}
  equal(params['decoder'], models[1]['decoder'])  # frozen in this stage
  # The same command again: nothing is to be done, whatever the files' times.
  assert evaluate.is_complete(started, workdir)


def test_imported_is_a_starting_point_like_any(cfg, models, run, tmp_path):
  """Through a checkpoint or straight: the stage ends in the same numbers."""
  target = str(tmp_path / 'imported')
  exchange.run_import(cfg, str(tmp_path), both(models), target)
  meta = checkpoint.read_meta(target)
  assert meta['trained'] == ['decoder', 'encoder']
  opened = session.open_model(cfg)
  params, _ = session.load_params(opened, target, 'test')
  for group in ('decoder', 'encoder'):
    equal(params[group], models[1][group])
  workdir = str(tmp_path / 'run')
  train.run(toy_run.replaced(cfg, init_from=target), workdir)
  records = [
    train.results.read_json(f'{path}/results.json')['stages']['reconstruct']
    for path in (workdir, run[1])
  ]
  assert records[0]['heldout_after'] == records[1]['heldout_after']
  with pytest.raises(UserError, match='holds a checkpoint already'):
    exchange.run_import(cfg, str(tmp_path), both(models), target)


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
  started, workdir = run
  target = str(tmp_path_factory.mktemp('out') / 'deep' / 'export')
  source = f'{workdir}/checkpoints/reconstruct'
  exchange.run_export(started, workdir, source, target)
  return target


def test_an_export_comes_back_bit_for_bit(cfg, run, exported, tmp_path):
  opened = session.open_model(cfg)
  there, _ = session.load_params(
    opened, f'{run[1]}/checkpoints/reconstruct', 'test'
  )
  here, groups = session.load_params(opened, exported, 'test')
  assert set(groups) == {'decoder', 'encoder', 'projection'}
  for group in groups:
    equal(here[group], there[group])
  saved = json.loads(open(f'{exported}/refrag.json').read())  # noqa: SIM115
  assert saved['stage'] == 'reconstruct' and saved['chunk_size'] == 4
  assert saved['model']['decoder'] == dataclasses.asdict(cfg.model.decoder)
  assert sorted(os.listdir(exported)) == [
    'README.md', 'decoder', 'encoder', 'projection.safetensors', 'refrag.json',
  ]  # fmt: skip
  # In, and out, and in again.
  target = str(tmp_path / 'imported')
  exchange.run_import(cfg, str(tmp_path), exported, target)
  again = str(tmp_path / 'again')
  exchange.run_export(cfg, str(tmp_path), target, again)
  back, _ = session.load_params(opened, again, 'test')
  for group in groups:
    equal(back[group], there[group])


def test_an_export_is_evaluated_as_its_stage(cfg, run, exported, tmp_path):
  asked = toy_run.replaced(cfg, init_from=exported)
  evaluate.run(asked, str(tmp_path))
  here, there = (
    train.results.read_json(f'{path}/results.json')['evals']
    for path in (tmp_path, run[1])
  )
  assert here['reconstruction'] == there['reconstruction']


def test_a_run_is_evaluated_and_not_what_it_started_from(run):
  """Its config names the models; its checkpoints are what is measured."""
  started, workdir = run
  path = f'{workdir}/results.json'
  before = train.results.read_json(path)
  evaluate.run(started, workdir)
  after = train.results.read_json(path)
  assert after['evals'] == before['evals'] and after['evals']['reconstruction']


def test_what_came_in_is_a_decoder_before_refrag(cfg, models, tmp_path):
  asked = toy_run.replaced(
    cfg, init_from=both(models), evals=('log_perplexity',)
  )
  evaluate.run(asked, str(tmp_path))
  evals = train.results.read_json(tmp_path / 'results.json')['evals']
  (rows,) = evals['log_perplexity'].values()
  assert {'no_context', 'full_context'} <= rows.keys()
  assert not any(row.startswith('refrag') for row in rows)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda saved: saved.pop('sha256'), 'is not what an export writes'),
    (lambda saved: saved.update(format=0), 'an export of format 0'),
    (
      lambda saved: saved['tokenizers'].update(decoder='other'),
      'another tokenizer of its decoder',
    ),
  ],
)
def test_another_export_is_refused(cfg, exported, tmp_path, change, message):
  copy = tmp_path / 'copy'
  shutil.copytree(exported, copy)
  saved = json.loads((copy / 'refrag.json').read_text())
  change(saved)
  (copy / 'refrag.json').write_text(json.dumps(saved))
  opened = session.open_model(cfg)
  with pytest.raises(UserError, match=message):
    session.trained_groups(opened, str(copy), 'why')


def test_half_of_an_export_is_a_model_of_its_own(cfg, exported, run):
  pair = f'{exported}/decoder,{exported}/encoder'
  opened = session.open_model(cfg)
  params, groups = session.load_params(opened, pair, 'test')
  assert groups == ['decoder', 'encoder']
  whole, _ = session.load_params(opened, exported, 'test')
  for group in groups:
    equal(params[group], whole[group])
  assert hf_families.pooling(f'{exported}/encoder') == 'cls'


def test_damage_to_an_export_is_seen(cfg, exported, tmp_path):
  copy = str(tmp_path / 'copy')
  shutil.copytree(exported, copy)
  path = f'{copy}/decoder/model.safetensors'
  with open(path, 'r+b') as f:  # one bit, far behind the header
    f.seek(-100, os.SEEK_END)
    byte = f.read(1)[0]
    f.seek(-1, os.SEEK_CUR)
    f.write(bytes([byte ^ 1]))
  with pytest.raises(UserError, match='model.safetensors is damaged'):
    pretrained.locate(copy)
  os.unlink(path)
  with pytest.raises(UserError, match='lacks decoder/model.safetensors'):
    pretrained.locate(copy)


def test_what_does_not_fit_leaves_nothing_behind(cfg, models, tmp_path):
  wrong = toy_run.replaced(
    cfg,
    model=dataclasses.replace(
      cfg.model, decoder=dataclasses.replace(cfg.model.decoder, mlp_width=8)
    ),
  )
  target = tmp_path / 'imported'
  with pytest.raises(UserError, match='mlp_width is 8 in the config and 32'):
    exchange.run_import(wrong, str(tmp_path), both(models), str(target))
  assert not target.exists()
  with pytest.raises(UserError, match='needs --from='):
    exchange.run_import(cfg, str(tmp_path), '', str(target))
  with pytest.raises(UserError, match='needs --from='):
    exchange.run_export(cfg, str(tmp_path), 'x', '')


def cut(decoder):
  path = decoder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


def config_json(**values):
  def change(decoder):
    path = decoder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

  return change


words = hf_tokenizers.Tokenizer(
  hf_tokenizers.models.WordLevel({'<unk>': 0, '</s>': 1, 'A': 2}, '<unk>')
)
SMALL = (
  '--config.model.chunk_size=4',
  '--config.data.max_encoder_tokens=8',
  *(
    f'--config.stage.{stage}.context_length=16'
    for stage in ('reconstruct', 'cpt', 'cpt_trained')
  ),
  '--config.eval.reconstruct_lengths=(8, 16)',
)
LATER = 'model-00001-of-00002.safetensors'
BAD = {  # what happened to the decoder's directory, other flags, what is said
  'cut off': (cut, (), 'model.safetensors is damaged or cut off'),
  'a file is missing': (
    lambda d: (
      (d / 'model.safetensors')
      .rename(d / 'model.safetensors.index.json')
      .write_text(json.dumps({'weight_map': {'x': LATER}}))
    ),
    (),
    f'lacks {LATER} of the 1 files',
  ),
  'other shapes': (
    config_json(intermediate_size=16),
    (),
    'its config.json makes it (16, 16)',
  ),
  'architecture': (
    config_json(model_type='gpt2'),
    (),
    "a model of type 'gpt2', which is not supported",
  ),
  'config against weights': (
    lambda _: None,
    ('--config.model.decoder.mlp_width=16',),
    'mlp_width is 16 in the config and 32',
  ),
  'quantized': (
    config_json(quantization_config={'quant_method': 'gptq'}),
    (),
    'is quantized (gptq)',
  ),
  'another tokenizer': (
    lambda d: (d / 'tokenizer.json').write_text(words.to_str()),
    (),
    "config.data.tokenizer is 'bytes', but the model in",
  ),
  'vocabulary': (
    config_json(vocab_size=100),
    (),
    'vocab',
  ),
  'positions': (
    lambda _: None,
    tuple(
      f'--config.stage.{stage}.context_length=128'
      for stage in ('cpt', 'cpt_trained')
    ),
    'model.decoder.max_length',
  ),
  'nowhere': (lambda d: shutil.rmtree(d), (), 'is no directory'),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input_is_one_line(what, models, tmp_path, capsys):
  change, flags, message = BAD[what]
  shutil.copytree(models[0], tmp_path / 'models')
  decoder = tmp_path / 'models' / 'decoder'
  change(decoder)
  pair = f'{decoder},{tmp_path / "models" / "encoder"}'
  argv = [
    f'--config={ROOT}/configs/pair.py:{pair}',
    '--config.data.tokenizer=bytes',
    '--config.data.encoder_tokenizer=bytes',
    f'--workdir={tmp_path}/run',
    *SMALL,
    *flags,
  ]
  for mode in ('import', 'train'):
    source = [f'--from={pair}'] if mode == 'import' else []
    assert main.main([*argv, f'--mode={mode}', *source]) == 2
    lines = capsys.readouterr().err.strip().split('\n')
    assert len(lines) == 1 and message in lines[0]
  run = tmp_path / 'run'
  there = [p.name for p in run.rglob('*') if p.is_file()]
  assert not {'metrics.jsonl', 'reconstruct.json', '_METADATA'} & set(there)
  for stage in ('imported', 'reconstruct'):
    assert checkpoint.latest_step(run / 'checkpoints' / stage) is None


def test_an_export_has_its_tokenizers(cfg, models, tmp_path):
  (tmp_path / 'words').mkdir()
  (tmp_path / 'words' / 'tokenizer.json').write_text(words.to_str())
  (tmp_path / 'words' / 'notes.txt').write_text('of no use to a tokenizer')
  data = dataclasses.replace(cfg.data, tokenizer=str(tmp_path / 'words'))
  named = dataclasses.replace(cfg, data=data)
  target = str(tmp_path / 'imported')
  exchange.run_import(named, str(tmp_path), both(models), target)
  exchange.run_export(named, str(tmp_path), target, str(tmp_path / 'out'))
  out = tmp_path / 'out' / 'decoder'
  assert sorted(os.listdir(out)) == [
    'config.json', 'model.safetensors', 'tokenizer.json',
  ]  # fmt: skip
  mark = tokenizers.load(str(tmp_path / 'words')).fingerprint
  assert tokenizers.load(str(out)).fingerprint == mark
  assert not list((tmp_path / 'out' / 'encoder').glob('token*'))  # bytes
  values = json.loads((out / 'config.json').read_text())
  assert values['eos_token_id'] == 1  # '</s>' in there


def test_an_export_that_fails_leaves_nothing_behind(run, tmp_path, monkeypatch):
  started, workdir = run

  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(convert_hf, 'save_file', full)
  source = f'{workdir}/checkpoints/reconstruct'
  with pytest.raises(OSError, match='No space'):
    exchange.run_export(started, workdir, source, str(tmp_path / 'out'))
  assert os.listdir(tmp_path) == []


def test_another_chunk_size_is_refused(folder, exported):
  other = toy_run.config(
    folder, stages=('reconstruct',), model__chunk_size=8,
    data__max_encoder_tokens=8, model__decoder__max_length=64,
  )  # fmt: skip
  opened = session.open_model(other)
  with pytest.raises(UserError, match='trained with model.chunk_size 4'):
    session.trained_groups(opened, exported, 'why')
