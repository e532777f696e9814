"""`--mode=import` and `--mode=export`: there and back, and what is refused."""

import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf_tokenizers
import toy_config
import toy_run
from safetensors.numpy import load_file, save_file
from toy_run import one_device  # noqa: F401

import refrag_jax
from refrag_jax import checkpoint, cli, evaluate, exchange, main, session
from refrag_jax import run as training
from refrag_jax.data import tokenizers
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, families, sources
from refrag_jax.models.refrag import Refrag, init_params
from refrag_jax.runtime import files as files_lib
from refrag_jax.runtime.environment import ROOT


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
    ('decoder', families.decoder_json), ('encoder', families.encoder_json)
  ):  # fmt: skip
    os.makedirs(folder / group)
    values = to_json(getattr(cfg.model, group))
    convert.write_params(
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
  training.run(started, workdir)
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
  training.run(toy_run.replaced(cfg, init_from=target), workdir)
  records = [
    files_lib.read_json(f'{path}/results.json')['stages']['reconstruct']
    for path in (workdir, run[1])
  ]
  assert records[0]['heldout_after'] == records[1]['heldout_after']
  with pytest.raises(UserError, match='holds a checkpoint already'):
    exchange.run_import(cfg, str(tmp_path), both(models), target)


def test_an_import_can_be_evaluated(cfg, models, tmp_path):
  """It is the decoder before REFRAG, wherever it lies."""
  target = str(tmp_path / 'any' / 'name')
  exchange.run_import(cfg, str(tmp_path), both(models), target)
  asked = toy_run.replaced(
    cfg, evals=('log_perplexity', 'copying', 'selection'), init_from=target
  )
  evaluate.run(asked, str(tmp_path / 'measured'))
  numbers = files_lib.read_json(tmp_path / 'measured' / 'results.json')
  assert list(numbers['evals']['log_perplexity']['text']) == BEFORE_ROWS
  assert list(numbers['evals']['copying']['text']) == ['first', 'second']
  assert numbers['evals']['selection'] == {}
  (line,) = numbers['left_out']
  assert line.startswith('eval selection: left out, ')
  html = (tmp_path / 'measured' / 'report.html').read_text()
  assert line in html


BEFORE_ROWS = ['no_context', 'full_context', 'last_k', 'replug']


def test_an_imported_decoder_is_the_one_before_refrag(cfg, models, run):
  started, workdir = run
  shutil.copytree(workdir, f'{workdir}_copy')
  files_lib.write_json(
    f'{workdir}_copy/config.json', {'config': dataclasses.asdict(started)}
  )
  asked = toy_run.replaced(
    started,
    stages=('reconstruct',),
    evals=('log_perplexity', 'copying'),
  )
  evaluate.run(asked, f'{workdir}_copy')
  evals = files_lib.read_json(f'{workdir}_copy/results.json')['evals']
  assert list(evals['log_perplexity']['text']) == BEFORE_ROWS
  assert set(evals) == {'reconstruction', 'log_perplexity', 'copying'}


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
    files_lib.read_json(f'{path}/results.json')['evals']
    for path in (tmp_path, run[1])
  )
  assert here['reconstruction'] == there['reconstruction']


def test_a_run_is_evaluated_and_not_what_it_started_from(run):
  """Its config names the models; its checkpoints are what is measured."""
  started, workdir = run
  path = f'{workdir}/results.json'
  before = files_lib.read_json(path)
  evaluate.run(started, workdir)
  after = files_lib.read_json(path)
  assert after['evals'] == before['evals'] and after['evals']['reconstruction']


def test_what_came_in_is_a_decoder_before_refrag(cfg, models, tmp_path):
  asked = toy_run.replaced(
    cfg, init_from=both(models), evals=('log_perplexity',)
  )
  evaluate.run(asked, str(tmp_path))
  evals = files_lib.read_json(tmp_path / 'results.json')['evals']
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
  assert families.pooling(f'{exported}/encoder') == 'cls'


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
    sources.locate(copy)
  os.unlink(path)
  with pytest.raises(UserError, match='lacks decoder/model.safetensors'):
    sources.locate(copy)


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

  monkeypatch.setattr(convert, 'save_file', full)
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


# --- Out as it came in --------------------------------------------------------


@pytest.fixture(scope='module')
def released(cfg, models, tmp_path_factory):
  """The same models as a publisher has them: bfloat16, with all around them.

  Returns:
    (The config of a run on them, their directory, what an export of them is.)
  """
  folder = tmp_path_factory.mktemp('released')
  for group in ('decoder', 'encoder'):
    directory = folder / group
    shutil.copytree(f'{models[0]}/{group}', directory)
    path = directory / 'model.safetensors'
    tensors = {
      name: x.astype(jnp.bfloat16) for name, x in load_file(path).items()
    }
    if group == 'decoder':
      norm = 'model.norm.weight'
      tensors[norm] = tensors[norm].astype(np.float32)
    else:
      tensors['pooler.dense.weight'] = np.ones((3, 3), jnp.bfloat16)
    save_file(tensors, path)
    values = json.loads((directory / 'config.json').read_text())
    eps = {
      key: float(np.float32(values[key])) for key in values if 'eps' in key
    }
    more = {'pad_token_id': 2, 'unk_token_id': 0, 'torch_dtype': 'bfloat16'}
    (directory / 'config.json').write_text(json.dumps(values | eps | more))
    (directory / 'tokenizer.json').write_text(words.to_str())
    (directory / 'chat_template.jinja').write_text('{{ messages }}')
    (directory / 'generation_config.json').write_text('{"top_p": 0.9}')
    (directory / 'additional_chat_templates').mkdir()
    (directory / 'additional_chat_templates' / 'rag.jinja').write_text('x')
  (folder / 'encoder' / 'modules.json').write_text(
    json.dumps([
      {'idx': 0, 'name': '0', 'path': '', 'type': 'st.models.Transformer'},
      {'idx': 1, 'name': '1', 'path': '1_Pooling', 'type': 'st.models.Pooling'},
      {'idx': 2, 'name': '2', 'path': '2_Dense', 'type': 'st.models.Dense'},
      {'idx': 3, 'name': '3', 'path': '3_N', 'type': 'st.models.Normalize'},
    ])
  )  # fmt: skip
  decoder, encoder = str(folder / 'decoder'), str(folder / 'encoder')
  data = dataclasses.replace(
    cfg.data, tokenizer=decoder, encoder_tokenizer=encoder
  )
  decoder_cfg, encoder_cfg = (
    dataclasses.replace(old, norm_eps=float(np.float32(old.norm_eps)))
    for old in (cfg.model.decoder, cfg.model.encoder)
  )
  model = dataclasses.replace(
    cfg.model, decoder=decoder_cfg, encoder=encoder_cfg
  )
  named = dataclasses.replace(cfg, data=data, model=model)
  target, out = str(folder / 'imported'), str(folder / 'out')
  exchange.run_import(named, str(folder), f'{decoder},{encoder}', target)
  mask = os.umask(0o027)
  try:
    exchange.run_export(named, str(folder), target, out)
  finally:
    os.umask(mask)
  return named, str(folder), out


def test_untouched_weights_go_out_bit_for_bit(released):
  named, folder, out = released
  for group in ('decoder', 'encoder'):
    came = load_file(f'{folder}/{group}/model.safetensors')
    went = load_file(f'{out}/{group}/model.safetensors')
    assert came.keys() == went.keys()  # with the pooler
    for name, tensor in came.items():
      exact = re.search('(position|token_type)_embed', name)  # a sum here
      wanted = np.dtype(np.float32) if exact else tensor.dtype
      assert went[name].dtype == wanted, name
      np.testing.assert_array_equal(went[name], tensor.astype(wanted))
    values = json.loads(open(f'{out}/{group}/config.json').read())  # noqa: SIM115
    assert values['dtype'] == 'bfloat16' and 'torch_dtype' not in values
  opened = session.open_model(named)
  there, _ = session.load_params(
    opened, f'{folder}/decoder,{folder}/encoder', 'test'
  )
  for source in (out, f'{out}/decoder,{out}/encoder'):
    here, groups = session.load_params(opened, source, 'test')
    for group in groups:
      equal(here[group], there[group])


def test_what_belongs_to_a_model_goes_out_with_it(released):
  _, _, out = released
  read = lambda name: json.loads(open(f'{out}/{name}').read())  # noqa: SIM115
  for group in ('decoder', 'encoder'):
    assert {
      'chat_template.jinja', 'generation_config.json', 'tokenizer.json',
      'additional_chat_templates',
    } <= set(os.listdir(f'{out}/{group}'))  # fmt: skip
    values = read(f'{group}/config.json')
    assert (values['pad_token_id'], values['unk_token_id']) == (2, 0)
    assert all(len(str(v)) < 8 for k, v in values.items() if 'eps' in k)
  kinds = [(m['type'], m['path']) for m in read('encoder/modules.json')]
  assert kinds == [
    ('st.models.Transformer', ''),
    ('st.models.Pooling', '1_Pooling'),
    ('st.models.Normalize', '2_Normalize'),
  ]
  saved = read('refrag.json')
  assert saved['max_encoder_tokens'] == 6
  for group in ('decoder', 'encoder'):
    assert saved['base'][group]['name'].endswith(f'/{group}')
    assert 'norm_eps' in saved['model'][group]
    assert len(str(saved['model'][group]['norm_eps'])) < 8


def test_files_have_the_permissions_of_any_new_file(released):
  _, _, out = released
  for folder, folders, files in os.walk(out):
    for name in files:
      assert os.stat(f'{folder}/{name}').st_mode & 0o777 == 0o640, name
    for name in ('.', *folders):
      assert os.stat(f'{folder}/{name}').st_mode & 0o777 == 0o750, name


@pytest.mark.slow
def test_a_trained_run_remembers_what_it_came_from(cfg, released, tmp_path):
  """Through a run's stage, and in and out once more."""
  named, folder, _ = released
  for group in ('decoder', 'encoder'):
    shutil.copytree(f'{folder}/{group}', tmp_path / group)
    (tmp_path / group / 'tokenizer.json').unlink()
  pair = f'{tmp_path}/decoder,{tmp_path}/encoder'
  started = toy_run.replaced(named, data=cfg.data, init_from=pair, evals=())
  training.run(started, str(tmp_path / 'run'))
  source, out = f'{tmp_path}/run/checkpoints/reconstruct', f'{tmp_path}/out'
  exchange.run_export(started, '', source, out)
  kinds = lambda of: {
    name: x.dtype
    for name, x in load_file(f'{of}/encoder/model.safetensors').items()
  }
  assert set(map(str, kinds(out).values())) == {'bfloat16', 'float32'}
  assert 'was trained in float32, and what training has changed is ' in (
    open(f'{out}/README.md').read()  # noqa: SIM115
  )
  again = str(tmp_path / 'again')
  exchange.run_export(started, '', out, again)
  assert kinds(again) == kinds(out)
  assert os.path.exists(f'{again}/projection.safetensors')


def test_float16_that_would_overflow_stays_float32():
  base = {'dtypes': {'a': 'float16', 'b': 'bfloat16'}}
  fits = {'x': jnp.array([65504.0, -1.0])}
  assert exchange._dtypes(fits, base) == base['dtypes']
  above = {'x': jnp.array([1.0, -70000.0])}
  assert exchange._dtypes(above, base) == {'b': 'bfloat16'}


def test_an_export_of_an_older_version_is_read(cfg, run, exported, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(exported, copy)
  (copy / 'README.md').unlink()
  saved = json.loads((copy / 'refrag.json').read_text())
  del saved['base'], saved['max_encoder_tokens']
  (copy / 'refrag.json').write_text(json.dumps(saved))
  opened = session.open_model(cfg)
  here, groups = session.load_params(opened, str(copy), 'test')
  whole, _ = session.load_params(opened, exported, 'test')
  for group in groups:
    equal(here[group], whole[group])
  exchange.run_export(cfg, '', str(copy), str(tmp_path / 'again'))


def test_the_cards_code_is_our_projection(cfg, exported):
  torch = pytest.importorskip('torch')
  pytest.importorskip('safetensors.torch')
  with open(f'{exported}/README.md') as f:
    card = f.read()
  with open(f'{exported}/refrag.json') as f:
    keys = json.load(f).keys()
  for key in keys:
    assert f'`{key}`' in card, key
  code = card.split('```python\n')[1].split('```')[0]
  names = {'directory': exported}
  exec(code, names)
  opened = session.open_model(cfg)
  params, _ = session.load_params(opened, exported, 'test')
  E = cfg.model.encoder.width
  c_XE = np.random.default_rng(0).normal(size=(5, E)).astype(np.float32)
  ours = Refrag(cfg.model).apply(
    {'params': params}, c_XE, method=lambda model, c: model.projection(c)
  )
  theirs = names['project'](torch.tensor(c_XE)).numpy()
  np.testing.assert_allclose(theirs, ours, rtol=2e-5, atol=1e-6)


# --- Where it goes ------------------------------------------------------------


def refused_target(config, source, target) -> str:
  with pytest.raises(UserError) as e:
    exchange.run_export(config, '', source, str(target))
  assert '\n' not in str(e.value)
  return str(e.value)


def test_a_target_is_checked_before_anything_is_read(
  run, models, tmp_path, monkeypatch
):
  started, workdir = run
  monkeypatch.setattr(session, 'open_model', lambda *_: pytest.fail('was read'))
  source = f'{workdir}/checkpoints/reconstruct'
  there = sorted(os.walk(workdir))
  full, link, file = (tmp_path / name for name in ('full', 'link', 'file'))
  full.mkdir()
  file.write_text('')
  (full / 'x').write_text('')
  link.symlink_to(full)
  (tmp_path / 'dangling').symlink_to(file / 'x')
  for target, message in (
    (source, 'lies in'),
    (f'{source}/out', 'lies in'),
    (f'{source}/../reconstruct/out', 'lies in'),
    (workdir, 'not empty'),
    (full, 'not empty'),
    (link, 'not empty'),
    (file, 'is a file'),
    (file / 'below', 'cannot be written'),
    (tmp_path / 'dangling', 'cannot be written'),
    (tmp_path / ('x' * 300), 'cannot be written'),
    ('/proc/nope/out', 'cannot be written'),
    ('/', 'not empty'),
  ):
    assert message in refused_target(started, source, target), target
  decoder = f'{models[0]}/decoder'
  assert 'lies in' in refused_target(started, both(models), f'{decoder}/out')
  data = dataclasses.replace(started.data, tokenizer=decoder)
  named = dataclasses.replace(started, data=data)
  assert 'lies in' in refused_target(named, source, f'{decoder}/out')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  assert 'current directory' in refused_target(started, source, '.')
  assert sorted(os.walk(workdir)) == there
  assert sorted(os.listdir(tmp_path)) == [
    'dangling', 'file', 'full', 'here', 'link',
  ]  # fmt: skip


def test_a_wrong_source_leaves_no_directory(cfg, tmp_path):
  message = refused_target(cfg, f'{tmp_path}/none', tmp_path / 'a' / 'b' / 'c')
  assert 'no checkpoint in' in message
  assert os.listdir(tmp_path) == []


def test_a_target_is_what_was_meant(released, tmp_path, monkeypatch):
  """Home, a relative path, a link to an empty directory."""
  named, folder, _ = released
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'link').symlink_to('empty')
  for target in ('~/home', 'relative/../there', 'link'):
    exchange.run_export(named, '', f'{folder}/imported', target)
  for name in ('home', 'there', 'empty'):
    assert (tmp_path / name / 'refrag.json').exists(), name
  assert (tmp_path / 'link').is_symlink()
  assert sorted(os.listdir(tmp_path)) == ['empty', 'home', 'link', 'there']


def test_an_import_writes_into_nothing_of_the_users(cfg, models, tmp_path):
  """A model's directory would take the checkpoint in, and be none after."""
  decoder = f'{models[0]}/decoder'
  before = sorted(os.walk(models[0]))
  (tmp_path / 'file').write_text('')
  for target, message in (
    (decoder, r'holds something else \(config.json\)'),
    (str(tmp_path / 'file'), 'is a file'),
  ):
    with pytest.raises(UserError, match=message):
      exchange.run_import(cfg, str(tmp_path), both(models), target)
  assert sorted(os.walk(models[0])) == before


def test_a_disk_without_room_is_told_before(released, tmp_path, monkeypatch):
  named, folder, _ = released
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  message = refused_target(named, f'{folder}/imported', tmp_path / 'out')
  assert 'the export needs' in message and os.listdir(tmp_path) == []


# --- Whose config -------------------------------------------------------------


def loaded(*argv):
  return cli.load(cli.parse(list(argv)))


@pytest.fixture
def with_config(run):
  started, workdir = run
  path = f'{workdir}/config.json'
  record = {'config': dataclasses.asdict(started), 'sources': {'seed': 'x.py'}}
  files_lib.write_json(path, record)
  yield started, workdir
  os.unlink(path)


def test_an_export_finds_the_config_of_its_run(with_config, tmp_path, capsys):
  started, workdir = with_config
  source = f'--from={workdir}/checkpoints/reconstruct'
  found = loaded('--mode=export', source, '--to=x')
  assert found.config == started
  assert found.command.workdir == workdir
  # A step of it, and with a value of one's own.
  found = loaded('--mode=export', f'{source}/2/', '--config.seed=9')
  assert found.config == dataclasses.replace(started, seed=9)
  assert found.sources['seed'] == 'command line'
  before = sorted(os.listdir(workdir))
  out = f'--to={tmp_path}/out'
  assert main.main(['--mode=export', source, out]) == 0
  assert (tmp_path / 'out' / 'projection.safetensors').exists()
  assert sorted(os.listdir(workdir)) == before
  assert 'seed ' in capsys.readouterr().out  # it is shown
  path = f'{workdir}/config.json'
  files_lib.write_json(path, {'model_type': 'llama'})
  with pytest.raises(UserError, match='holds no config of a run'):
    loaded('--mode=export', source)


def test_an_imported_checkpoint_has_the_config_of_its_import(cfg, tmp_path):
  for name, seed in (('config.json', 1), ('config_import.json', 2)):
    saved = dataclasses.replace(cfg, seed=seed)
    record = {'config': dataclasses.asdict(saved), 'sources': {}}
    files_lib.write_json(tmp_path / name, record)
  for stage, seed in (('imported', 2), ('reconstruct', 1)):
    source = f'--from={tmp_path}/checkpoints/{stage}'
    assert loaded('--mode=export', source).config.seed == seed


def test_a_pair_is_its_own_config(models):
  decoder, encoder = both(models).split(',')
  argv = (
    '--mode=import',
    '--config.data.tokenizer=bytes',
    '--config.data.encoder_tokenizer=bytes',
    *SMALL,
  )
  named = loaded(
    f'--config={ROOT}/configs/pair.py:{decoder},{encoder}',
    f'--from={decoder},{encoder}',
    *argv,
  )
  for source in (f'{decoder},{encoder}', f'{encoder}, {decoder}'):
    found = loaded(f'--from={source}', *argv)
    assert found.config == named.config
  with pytest.raises(UserError, match='is no directory'):
    loaded(f'--from={decoder},/nowhere', *argv)
  for source in (decoder, f'{decoder},{decoder}', '/nowhere', 'a/checkpoints'):
    with pytest.raises(UserError, match=r'no config: add --config=FILE.py'):
      loaded(f'--from={source}', *argv)
  with pytest.raises(UserError, match='no config'):
    loaded('--mode=import')


# --- Answers ------------------------------------------------------------------


def test_a_checkpoint_answers_and_so_does_its_export(
  with_config, exported, capsys, tmp_path
):
  """By their own configs, from Python and from the command line."""
  source = f'{with_config[1]}/checkpoints/reconstruct'
  ask = dict(expand='1', max_tokens=8)
  answers = [
    refrag_jax.Refrag.from_pretrained(of, pools=[(1, 0)]).answer(
      'q?', ['some text to read'], **ask
    )
    for of in (source, exported)
  ]
  assert answers[0].tokens == answers[1].tokens
  assert answers[0].text == answers[1].text
  assert sum(chunk.expanded for chunk in answers[0].trace) == 1
  with pytest.raises(UserError, match='is neither RUN/checkpoints/STAGE'):
    refrag_jax.Refrag.from_pretrained(str(tmp_path))
  passages = tmp_path / 'p.txt'
  passages.write_text('some text to read\n\n \n\nsome more')
  argv = [f'--from={exported}', '--mode=ask', 'q?']
  more = [f'--passages={passages}', '--expand', '1', '--selector=last']
  assert main.main([*argv, *more]) == 0
  out = capsys.readouterr().out
  assert re.search(r'[1-4] tokens', out) and 'first token after' in out
  assert '1 vector' in out
  for wrong, message in (
    ([*argv, 'r?'], "unexpected argument 'r?'"),
    ([argv[0], argv[1]], 'no question'),
    ([*argv, '--expand=7.0'], 'expand is'),
    ([*argv, '--passages=none.jsonl'], 'are not there'),
    ([argv[0], '--mode=export', '--to=x', 'q?'], "unexpected argument 'q?'"),
    (['--mode=ask', 'q?'], 'no config'),
  ):
    assert main.main(wrong) == 2
    assert message in capsys.readouterr().err
