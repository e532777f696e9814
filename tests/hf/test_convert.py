"""Hugging Face directories, without torch: shards, names, and what is refused.

Dimension key: Y layers.
"""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import toy
import transformers
from hf_directories import (
  GROUPS,
  abstract,
  config_of,
  of_directory,
  tree_of,
  write,
)
from safetensors.numpy import load_file, save_file

from refrag_jax import sharding
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, families, hub, sources


@pytest.mark.parametrize(
  'mesh_shape',
  [
    (2, 2, 2),
    *(
      pytest.param(shape, marks=pytest.mark.slow)
      for shape in [(1, 4, 2), (8, 1, 1)]
    ),
  ],
)
@pytest.mark.parametrize('name', GROUPS)
def test_shards_of_any_mesh_are_the_whole(name, mesh_shape, tmp_path):
  group, cfg, params = write(name, tmp_path / 'm')
  assert of_directory(tmp_path / 'm') == cfg
  mesh = sharding.make_mesh(*mesh_shape)
  read = convert.read_params(str(tmp_path / 'm'), abstract(name, mesh))
  if name == 'modernbert':  # its first layer has no such norm
    scale_YE = params['layers']['attention_norm']['scale']
    params = toy.jax.tree.map(lambda x: x, params)
    params['layers']['attention_norm']['scale'] = scale_YE.at[0].set(1)
  jax.tree.map(np.testing.assert_array_equal, read, params)
  if mesh_shape == (1, 4, 2) and group == 'decoder':
    kernel = read['layers']['q_proj']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_no_more_is_read_than_the_shards(tmp_path, monkeypatch):
  """A kernel that lies on eight devices is read once."""
  write('llama', tmp_path / 'm')
  read = []
  original = convert._read_range

  def counted(files, tensor, name, name_of, shape, bounds):
    out = original(files, tensor, name, name_of, shape, bounds)
    read.append((name, out.size))
    return out

  monkeypatch.setattr(convert, '_read_range', counted)
  mesh = sharding.make_mesh(1, 4, 2)
  convert.read_params(str(tmp_path / 'm'), abstract('llama', mesh))
  of_q = [size for name, size in read if name == 'layers.0.self_attn.q_proj.'
          'weight']  # fmt: skip
  assert of_q == [16 * 16]  # D x N H


def test_a_host_reads_what_its_own_devices_hold(tmp_path, monkeypatch):
  """As if two of the four rows of devices were another host's."""
  _, _, params = write('llama', tmp_path / 'm')
  mesh = sharding.make_mesh(1, 4, 2)
  leaf = abstract('llama', mesh)['layers']['q_proj']['kernel']
  bounds = {
    tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items()
    if device.id >= 4
  }
  read = []
  original = convert._read_range
  monkeypatch.setattr(
    convert, '_read_range',
    lambda *args: read.append(original(*args)) or read[-1],
  )  # fmt: skip
  files = convert.Files(str(tmp_path / 'm'))
  family = families.FAMILIES['llama']
  tensor = convert._tensor_of(family, 'layers/q_proj/kernel')
  name_of = {
    families.canonical(n, family.prefix, family): n for n in files.names()
  }
  parts = convert._read_parts(files, tensor, leaf, name_of, list(bounds))
  assert len(parts) == 4
  whole = np.asarray(params['layers']['q_proj']['kernel'])
  for place, part in parts.items():
    np.testing.assert_array_equal(part, whole[tuple(slice(*b) for b in place)])
  assert sum(x.size for x in read) == whole.size // 2


def test_replicas_share_what_was_read(tmp_path, monkeypatch):
  write('llama', tmp_path / 'm')
  calls = []
  original = convert._read_range
  monkeypatch.setattr(
    convert, '_read_range',
    lambda *args: calls.append(args[2]) or original(*args),
  )  # fmt: skip
  mesh = sharding.make_mesh(8, 1, 1)
  convert.read_params(str(tmp_path / 'm'), abstract('llama', mesh))
  assert len(calls) == len(set(calls))


def test_half_precision_is_cast_on_the_way(tmp_path):
  import ml_dtypes

  _, _, params = write('llama', tmp_path / 'm', ml_dtypes.bfloat16)
  mesh = sharding.make_mesh(1, 4, 2)
  read = convert.read_params(str(tmp_path / 'm'), abstract('llama', mesh))
  for ours, was in zip(jax.tree.leaves(read), jax.tree.leaves(params)):
    assert ours.dtype == np.float32
    rounded = np.asarray(was).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(ours, rounded)


def test_several_files_with_an_index(tmp_path, monkeypatch):
  monkeypatch.setattr(convert, 'SHARD_BYTES', 4000)
  _, _, params = write('llama', tmp_path / 'm')
  files = sorted(p.name for p in (tmp_path / 'm').glob('*.safetensors'))
  assert len(files) > 3 and files[0].startswith('model-00001-of-')
  index = json.loads((tmp_path / 'm' / convert.INDEX).read_text())
  assert set(index['weight_map'].values()) == set(files)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert index['metadata']['total_size'] == size
  mesh = sharding.make_mesh(1, 4, 2)
  read = convert.read_params(str(tmp_path / 'm'), abstract('llama', mesh))
  jax.tree.map(np.testing.assert_array_equal, read, params)
  # One of them is gone; one of them lacks a tensor.
  os.rename(tmp_path / 'm' / files[1], tmp_path / 'lost')
  with pytest.raises(UserError, match=f'lacks {files[1]} of the'):
    convert.Files(str(tmp_path / 'm'))
  save_file({'other': np.zeros(3)}, tmp_path / 'm' / files[1])
  with pytest.raises(UserError, match=f'is in {files[1]}, where it is not'):
    convert.Files(str(tmp_path / 'm'))


# --- What is refused ----------------------------------------------------------


def damaged(directory, how):
  """A written model with one thing wrong."""
  path = directory / 'model.safetensors'
  tensors = load_file(path) if how not in ('cut', 'header') else {}
  config = json.loads((directory / 'config.json').read_text())
  data = bytearray(path.read_bytes())
  if how == 'cut':
    path.write_bytes(data[: len(data) // 2])
  elif how == 'header':
    data[20] ^= 0xFF
    path.write_bytes(data)
  elif how == 'pickle':
    path.rename(directory / 'pytorch_model.bin')
  elif how == 'nothing':
    path.unlink()
  elif how == 'missing':
    del tensors['model.layers.1.mlp.up_proj.weight']
  elif how == 'left over':
    tensors['model.layers.2.mlp.up_proj.weight'] = np.zeros((24, 16), 'f4')
  elif how == 'twice':
    tensors['norm.weight'] = tensors['model.norm.weight']
  elif how == 'shape':
    name = 'model.layers.0.self_attn.k_proj.weight'
    tensors[name] = tensors[name][:-1]
  elif how == 'eight bits':
    name = 'model.layers.0.self_attn.k_proj.weight'
    tensors[name] = tensors[name].astype(np.int8)
  elif how == 'not finite':
    tensors['model.norm.weight'] = tensors['model.norm.weight'] * np.inf
  elif how == 'config':
    config['intermediate_size'] = 23
  elif how == 'unknown':
    config['model_type'] = 'gpt2'
  elif how == 'no number':
    del config['hidden_size']
  elif how == 'rope':
    config['rope_scaling'] = {'type': 'yarn', 'factor': 2.0}
  elif how == 'activation':
    config['hidden_act'] = 'gelu'
  if tensors and path.exists():
    save_file(tensors, path)
  (directory / 'config.json').write_text(json.dumps(config))


REFUSED = {
  'cut': 'model.safetensors is damaged or cut off',
  'header': 'model.safetensors is damaged or cut off',
  'pickle': 'pytorch_model.bin only, a pickle',
  'nothing': 'has no model.safetensors',
  'missing': 'lacks 1 tensors .* layers.1.mlp.up_proj.weight',
  'left over': 'no place in this model: layers.2.mlp.up_proj.weight',
  'twice': 'has both',
  'shape': r'k_proj.weight is \(7, 16\), but its config.json makes it \(8, 16\)',
  'eight bits': 'k_proj.weight is of type I8, which is none of F64, F32, F16',
  'not finite': 'norm.weight has values that are not finite',
  'config': r'is \(16, 24\), but its config.json makes it \(16, 23\)',
  'unknown': "a model of type 'gpt2', which is not supported",
  'no number': 'has no hidden_size',
  'rope': "scaled by 'yarn' are not supported",
  'activation': "hidden_act 'gelu' is not supported, only 'silu'",
}


@pytest.mark.parametrize('how', REFUSED)
def test_what_cannot_be_read_is_named(how, tmp_path):
  write('llama', tmp_path / 'm')
  damaged(tmp_path / 'm', how)
  mesh = sharding.make_mesh(1, 4, 2)

  def attempt():
    cfg = of_directory(tmp_path / 'm')
    tree = abstract('llama', mesh)
    if how == 'config':  # as the session would build it
      tree = tree_of(toy.replace('decoder', **dataclasses.asdict(cfg)), mesh)
    convert.read_params(str(tmp_path / 'm'), tree)

  with pytest.raises(UserError, match=REFUSED[how]) as e:
    attempt()
  assert '\n' not in str(e.value)


def test_a_tied_head_may_be_written_down(tmp_path):
  write('tied', tmp_path / 'm')
  path = tmp_path / 'm' / 'model.safetensors'
  tensors = load_file(path)
  mesh = sharding.make_mesh(1, 4, 2)
  save_file(
    tensors | {'lm_head.weight': tensors['model.embed_tokens.weight']}, path
  )
  convert.read_params(str(tmp_path / 'm'), abstract('tied', mesh))
  other = tensors['model.embed_tokens.weight'] + 1
  save_file(tensors | {'lm_head.weight': other}, path)
  with pytest.raises(UserError, match='no place in this model: lm_head.weight'):
    convert.read_params(str(tmp_path / 'm'), abstract('tied', mesh))


def test_heads_and_buffers_of_encoders_are_left_alone(tmp_path):
  write('bert', tmp_path / 'm')
  path = tmp_path / 'm' / 'model.safetensors'
  mesh = sharding.make_mesh(1, 4, 2)
  plain = convert.read_params(str(tmp_path / 'm'), abstract('bert', mesh))
  tensors = {f'bert.{name}': x for name, x in load_file(path).items()}
  for name in list(tensors):  # as the first BERTs have them
    for kind, old in (('weight', 'gamma'), ('bias', 'beta')):
      if name.endswith(f'LayerNorm.{kind}'):
        renamed = name.removesuffix(kind) + old
        tensors[renamed] = tensors.pop(name)
  tensors['bert.embeddings.position_ids'] = np.arange(6)
  tensors['bert.pooler.dense.weight'] = np.zeros((8, 8), 'f4')
  tensors['cls.predictions.bias'] = np.zeros(24, 'f4')
  save_file(tensors, path)
  read = convert.read_params(str(tmp_path / 'm'), abstract('bert', mesh))
  jax.tree.map(np.testing.assert_array_equal, plain, read)
  # An adapter is no head, though its name ends like one.
  tensors['encoder.layer.0.adapter_pooler.weight'] = np.zeros((8, 8), 'f4')
  save_file(tensors, path)
  with pytest.raises(UserError, match='no place in this model: encoder.layer'):
    convert.read_params(str(tmp_path / 'm'), abstract('bert', mesh))


def test_the_type_of_all_tokens_is_folded_into_their_positions(tmp_path):
  write('bert', tmp_path / 'm')
  path = tmp_path / 'm' / 'model.safetensors'
  tensors = load_file(path)
  rows = np.stack([np.arange(8.0), np.full(8, 99.0)]).astype('f4')
  save_file(tensors | {'embeddings.token_type_embeddings.weight': rows}, path)
  mesh = sharding.make_mesh(1, 4, 2)
  read = convert.read_params(str(tmp_path / 'm'), abstract('bert', mesh))
  wanted = tensors['embeddings.position_embeddings.weight'] + rows[:1]
  np.testing.assert_array_equal(read['position_embeddings'], wanted)


# --- Directories that hold more, or otherwise named ---------------------------

MESH = dict(data=1, fsdp=4, tensor=2)


def read_back(name, directory):
  mesh = sharding.make_mesh(**MESH)
  return convert.read_params(str(directory), abstract(name, mesh))


def renamed(directory, change):
  """The model with other names of its tensors; None: without that one."""
  path = directory / 'model.safetensors'
  tensors = {change(name): x for name, x in load_file(path).items()}
  tensors.pop(None, None)
  save_file(tensors, path)


@pytest.mark.parametrize(
  'file',
  ['adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin'],
)
def test_an_adapter_is_refused_beside_its_base_and_alone(file, tmp_path):
  write('llama', tmp_path / 'm')
  write('roberta', tmp_path / 'e')
  (tmp_path / 'm' / file).write_text('{"peft_type": "LORA"}')
  pair = f'{tmp_path / "m"},{tmp_path / "e"}'
  message = f'{tmp_path}/m holds a LoRA adapter: merge it first'
  with pytest.raises(UserError, match=message):
    sources.locate(pair)
  with pytest.raises(UserError, match=message):  # of config files
    families.numbers(str(tmp_path / 'm'), 'decoder')
  (tmp_path / 'm' / 'config.json').unlink()
  assert sources.is_source(str(tmp_path / 'm'))
  with pytest.raises(UserError, match=message):
    sources.locate(str(tmp_path / 'm'))


def test_an_adapter_within_the_file_is_refused(tmp_path):
  write('llama', tmp_path / 'm')
  path = tmp_path / 'm' / 'model.safetensors'
  q = 'base_model.model.model.layers.0.self_attn.q_proj'
  more = {f'{q}.lora_A.default.weight': np.zeros((2, 16), 'f4')}
  save_file(load_file(path) | more, path)
  with pytest.raises(UserError, match='merge it first'):
    read_back('llama', tmp_path / 'm')


@pytest.mark.parametrize('name', ['tied', 'roberta', 'bert', 'modernbert'])
def test_a_tied_model_may_have_its_head_alone(name, tmp_path):
  write(name, tmp_path / 'm')
  family = families.FAMILIES[
    families.read_config(str(tmp_path / 'm'))['model_type']
  ]
  plain, (embedding, head) = read_back(name, tmp_path / 'm'), family.tied
  renamed(
    tmp_path / 'm', lambda n: head if n.endswith(embedding) else n
  )  # fmt: skip
  jax.tree.map(
    np.testing.assert_array_equal, read_back(name, tmp_path / 'm'), plain
  )
  path = tmp_path / 'm' / 'config.json'
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {'tie_word_embeddings': False}))
  with pytest.raises(UserError, match='lacks 1 tensors'):
    read_back(name, tmp_path / 'm')


@pytest.mark.parametrize(
  ('prefix', 'of_head'),
  [
    ('model.language_model.', ''),
    ('language_model.model.', 'language_model.'),
    ('_orig_mod.model.', '_orig_mod.'),
    ('module.model.', 'module.'),
    ('base_model.model.model.', 'base_model.model.'),
    ('', ''),
  ],
)
def test_what_stands_before_all_names_is_left_off(
  prefix, of_head, tmp_path, capsys
):
  _, _, params = write('llama', tmp_path / 'm')
  read_back('llama', tmp_path / 'm')
  assert 'are read without' not in capsys.readouterr().out
  renamed(
    tmp_path / 'm',
    lambda name: (
      f'{of_head}{name}'
      if name == 'lm_head.weight'
      else prefix + name.removeprefix('model.')
    ),
  )
  read = read_back('llama', tmp_path / 'm')
  jax.tree.map(np.testing.assert_array_equal, read, params)
  shown = f'are read without {prefix!r}' in capsys.readouterr().out
  assert shown == bool(prefix)


def test_two_models_in_one_file_are_refused(tmp_path):
  write('bert', tmp_path / 'm')
  path = tmp_path / 'm' / 'model.safetensors'
  tensors = load_file(path)
  both = {
    f'{which}_encoder.{name}': x
    for which in ('query', 'passage')
    for name, x in tensors.items()
  }
  save_file(both, path)
  with pytest.raises(UserError, match='two models, whose tensors begin with'):
    read_back('bert', tmp_path / 'm')


def sentence_encoder(directory, pooling='1_Pooling'):
  """A BERT with pooling by the mean, a dense layer and a norm behind it."""
  kinds = ('Transformer', ''), ('Pooling', pooling), ('Dense', '2_Dense')
  kinds = (*kinds, ('Normalize', '3_Normalize'))
  (directory / 'modules.json').write_text(
    json.dumps([
      {'idx': i, 'name': str(i), 'path': path,
       'type': f'sentence_transformers.models.{kind}'}
      for i, (kind, path) in enumerate(kinds)
    ])
  )  # fmt: skip
  (directory / pooling).mkdir()
  (directory / pooling / 'config.json').write_text(
    json.dumps({'pooling_mode_mean_tokens': True})
  )


def test_what_is_left_out_is_named(tmp_path, capsys):
  write('bert', tmp_path / 'm')
  read_back('bert', tmp_path / 'm')
  assert 'left out' not in capsys.readouterr().out
  path = tmp_path / 'm' / 'model.safetensors'
  tensors = {f'bert.{name}': x for name, x in load_file(path).items()}
  tensors['bert.embeddings.position_ids'] = np.arange(6)  # no weights
  tensors['bert.pooler.dense.weight'] = np.zeros((8, 8), 'f4')
  tensors['linear.weight'] = np.zeros((3, 8), 'f4')  # of a ColBERT
  save_file(tensors, path)
  sentence_encoder(tmp_path / 'm')
  read_back('bert', tmp_path / 'm')
  assert (
    'left out, not part of what REFRAG runs: 2_Dense (Dense) and 3_Normalize '
    '(Normalize) and 2 tensors (linear.weight, pooler.dense.weight)'
  ) in capsys.readouterr().out.replace(
    '(pooler.dense.weight, linear.weight)',
    '(linear.weight, pooler.dense.weight)',
  )
  # Within the model it is no module behind it.
  tensors['bert.linear.weight'] = tensors.pop('linear.weight')
  save_file(tensors, path)
  with pytest.raises(UserError, match='no place in this model: linear.weight'):
    read_back('bert', tmp_path / 'm')


def test_pooling_is_where_modules_json_says(tmp_path):
  write('bert', tmp_path / 'm')
  sentence_encoder(tmp_path / 'm', '5_Pooling')
  assert families.pooling(str(tmp_path / 'm')) == 'mean'
  # The older layout, with the model in a directory of its own.
  top = tmp_path / 'old'
  shutil.copytree(tmp_path / 'm', top / '0_Transformer')
  for name in ('modules.json', '5_Pooling'):
    shutil.move(top / '0_Transformer' / name, top / name)
  modules = (top / 'modules.json').read_text()
  (top / 'modules.json').write_text(
    modules.replace('"path": ""', '"path": "0_Transformer"')
  )
  with pytest.raises(UserError, match='name .*/old/0_Transformer'):
    families.read_config(str(top))
  assert families.pooling(f'{top}/0_Transformer') == 'mean'
  (top / 'modules.json').write_text('{"no": "list"}')
  with pytest.raises(UserError, match='no list of modules'):
    families.modules(str(top))


POINTER = (
  'version https://git-lfs.github.com/spec/v1\noid sha256:cd\nsize 2690605\n'
)


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors', 'shard'])
def test_a_pointer_of_git_lfs_is_refused_by_name(file, tmp_path):
  write('llama', tmp_path / 'm')
  if file == 'shard':
    file, index = 'model-1.safetensors', {'norm.weight': 'model-1.safetensors'}
    (tmp_path / 'm' / 'model.safetensors').unlink()
    (tmp_path / 'm' / convert.INDEX).write_text(
      json.dumps({'weight_map': index})
    )
  (tmp_path / 'm' / file).write_text(POINTER)
  message = f'/m/{file} is a Git LFS pointer: run git lfs pull'
  with pytest.raises(UserError, match=message):
    read_back('llama', tmp_path / 'm')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-8'])
def test_json_is_read_in_any_unicode(encoding, tmp_path, monkeypatch):
  monkeypatch.setattr(convert, 'SHARD_BYTES', 4000)
  _, cfg, params = write('llama', tmp_path / 'm')
  for file in ('config.json', convert.INDEX):
    path = tmp_path / 'm' / file
    path.write_text(path.read_text(), encoding=encoding)
  assert of_directory(tmp_path / 'm') == cfg
  read = read_back('llama', tmp_path / 'm')
  jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
  ('text', 'message'),
  [('', 'config.json is empty: download'), ('{"a": ', 'damaged or cut off')],
)
def test_damaged_json_is_to_be_downloaded_again(text, message, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=f'{message}.*') as e:
    families.read_config(str(tmp_path))
  assert str(e.value).endswith('download it again')


# --- Out again as it came -----------------------------------------------------


def test_the_types_that_a_model_came_in(tmp_path):
  """One file in two types; what is a sum here stays as exact as it is."""
  write('bert', tmp_path / 'm', jax.numpy.bfloat16)
  path = tmp_path / 'm' / 'model.safetensors'
  tensors = load_file(path)
  for name in tensors:
    if 'LayerNorm' in name and '.1.' in name:  # of the second layer
      tensors[name] = tensors[name].astype('f4')
  save_file(tensors, path)
  found = convert.dtypes(str(tmp_path / 'm'))
  assert set(found.values()) == {'bfloat16'}
  wide = {tensor.theirs for tensor in families.BERT} - found.keys()
  assert wide == {
    'embeddings.position_embeddings.weight',
    *(
      f'encoder.layer.{{}}.{place}.LayerNorm.{kind}'
      for place in ('attention.output', 'output')
      for kind in ('weight', 'bias')
    ),
  }


def test_decimals_are_written_as_they_were():
  through_float32 = float(np.float32(1e-5))
  assert through_float32 == 9.999999747378752e-06
  values = {'a': [through_float32, 1e-12, 0.1, 10_000.0], 'b': 3, 'c': None}
  assert families.shortest(values) == values | {
    'a': [1e-5, 1e-12, 0.1, 10_000.0]
  }
  cfg = config_of('llama')[1].decoder
  ours = dataclasses.replace(cfg, norm_eps=through_float32)
  written = families.config_json('decoder', ours, {})
  assert written['rms_norm_eps'] == 1e-5
  theirs = families.decoder_config(written, 'm')
  assert families.differences(ours, theirs) == []  # it fits where it was
  assert families.differences(ours, dataclasses.replace(ours, norm_eps=2e-5))


def test_a_config_that_fits_goes_out_as_it_came():
  came = LLAMA | {
    'pad_token_id': 3, 'unk_token_id': 0, 'eos_token_id': [1, 2],
    'model_type': 'mistral', 'sliding_window': None, 'torch_dtype': 'bfloat16',
    'auto_map': {'AutoModel': 'a.program'}, 'attention_dropout': 0.0,
  }  # fmt: skip
  cfg = families.decoder_config(came, 'm')
  out = families.config_json('decoder', cfg, came)
  assert out == {
    key: value
    for key, value in came.items()
    if key not in ('torch_dtype', 'auto_map')
  } | {'architectures': ['MistralForCausalLM']}
  other = dataclasses.replace(cfg, mlp_width=8)  # of another model
  out = families.config_json('decoder', other, came)
  assert out == families.shortest(families.decoder_json(other))


def test_a_full_disk_is_the_disks_error(tmp_path, monkeypatch):
  """safetensors tells it as one of its own."""

  def full(*_, **__):
    raise convert.safetensors.SafetensorError(
      'Error while serializing: I/O error: No space left (os error 28) at path'
    )

  monkeypatch.setattr(convert, 'save_file', full)
  with pytest.raises(OSError, match='No space') as e:
    write('llama', tmp_path / 'm')
  assert e.value.errno == 28


# --- config.json, old and new -------------------------------------------------

LLAMA = dict(
  model_type='llama', vocab_size=32, hidden_size=16, intermediate_size=24,
  num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64,
  rms_norm_eps=1e-5,
)  # fmt: skip
SCALING = dict(
  factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)  # fmt: skip


@pytest.mark.parametrize(
  ('values', 'wanted'),
  [
    ({}, dict(rope_theta=1e4, num_kv_heads=4, head_dim=4, sliding_window=0)),
    ({'rope_theta': 5e5}, dict(rope_theta=5e5)),
    ({'rope_parameters': {'rope_theta': 5e5, 'rope_type': 'default'}},
     dict(rope_theta=5e5, rope_factor=1.0)),
    ({'rope_theta': 5e5, 'rope_scaling': SCALING | {'rope_type': 'llama3'}},
     dict(rope_theta=5e5, rope_factor=8.0, rope_original_length=8192)),
    ({'rope_scaling': SCALING | {'type': 'llama3'}}, dict(rope_factor=8.0)),
    ({'rope_parameters': SCALING | {'rope_type': 'llama3', 'rope_theta': 5e5}},
     dict(rope_theta=5e5, rope_factor=8.0)),
    ({'rope_scaling': SCALING | {'rope_type': 'llama3', 'rope_theta': 5e5}},
     dict(rope_theta=5e5, rope_factor=8.0)),
    ({'rope_theta': 1e6, 'rope_parameters': {'rope_theta': 5e5},
      'rope_scaling': {'rope_type': 'default', 'rope_theta': 2e5}},
     dict(rope_theta=2e5)),
    ({'rope_scaling': None}, dict(rope_factor=1.0)),
    ({'model_type': 'mistral'}, dict(sliding_window=4096)),
    ({'model_type': 'mistral', 'sliding_window': None}, dict(sliding_window=0)),
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': False},
     dict(sliding_window=0, qkv_bias=True)),
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True,
      'max_window_layers': 0}, dict(sliding_window=8)),
    ({'model_type': 'qwen2', 'use_sliding_window': True,
      'max_window_layers': 0}, dict(sliding_window=4096)),
    ({'model_type': 'qwen3', 'sliding_window': 8, 'use_sliding_window': True},
     dict(sliding_window=0)),  # from layer 28 on, and it has four
    ({'model_type': 'qwen3', 'attention_bias': False},
     dict(qk_norm=True, head_dim=128)),
    ({'tie_word_embeddings': True}, dict(tie_embeddings=True)),
  ],
)  # fmt: skip
def test_decoders_of_both_layouts(values, wanted):
  cfg = dataclasses.asdict(families.decoder_config(LLAMA | values, 'm'))
  assert {key: cfg[key] for key in wanted} == wanted


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True,
      'max_window_layers': 2}, 'some layers have a sliding window'),
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True,
      'num_hidden_layers': 29}, 'some layers have a sliding window'),
    ({'quantization_config': {'quant_method': 'fp8'}}, r'quantized \(fp8\)'),
    ({'attention_bias': True}, 'attention_bias True'),
    ({'mlp_bias': True}, 'mlp_bias True'),
    ({'model_type': 'roberta'}, 'which is an encoder'),
  ],
)  # fmt: skip
def test_variants_that_ours_has_not(values, message):
  with pytest.raises(UserError, match=message):
    families.decoder_config(LLAMA | values, 'm')


def test_modernbert_of_both_layouts():
  old = dict(
    model_type='modernbert', vocab_size=30, hidden_size=8, intermediate_size=12,
    num_hidden_layers=6, num_attention_heads=2, max_position_embeddings=64,
    global_attn_every_n_layers=3, local_attention=128, norm_eps=1e-5,
    global_rope_theta=160000.0, local_rope_theta=10000.0,
  )  # fmt: skip
  kinds = ['full_attention', 'sliding_attention', 'sliding_attention'] * 2
  ropes = {'full_attention': {'rope_theta': 160000.0},
           'sliding_attention': {'rope_theta': 10000.0}}  # fmt: skip
  new = {key: value for key, value in old.items()
         if not key.startswith(('global', 'local_rope'))}  # fmt: skip
  new |= {'layer_types': kinds, 'rope_parameters': ropes}
  cfg = families.encoder_config(old, 'mean', 'm')
  assert cfg == families.encoder_config(new, 'mean', 'm')
  assert (cfg.local_window, cfg.global_every, cfg.pooling) == (64, 3, 'mean')
  odd = new | {'layer_types': kinds[1:] + kinds[:1]}
  with pytest.raises(UserError, match='every n-th layer'):
    families.encoder_config(odd, 'mean', 'm')
  with pytest.raises(UserError, match='layer_types has 3 entries for 6 layers'):
    families.encoder_config(new | {'layer_types': kinds[:3]}, 'mean', 'm')
  yarn = {'rope_type': 'yarn', 'rope_theta': 160000.0, 'factor': 2.0}
  for scaled in (
    old | {'rope_scaling': yarn},
    new | {'rope_parameters': ropes | {'full_attention': yarn}},
  ):
    with pytest.raises(UserError, match="scaled by 'yarn' are not supported"):
      families.encoder_config(scaled, 'mean', 'm')


def test_a_decoder_that_was_a_bert():
  bert = dict(
    model_type='bert', vocab_size=30, hidden_size=8, intermediate_size=12,
    num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
  )  # fmt: skip
  families.encoder_config(bert, 'cls', 'm')
  for key in ('is_decoder', 'add_cross_attention'):
    with pytest.raises(UserError, match=f'{key} True is not supported'):
      families.encoder_config(bert | {key: True}, 'cls', 'm')


@pytest.mark.parametrize('kind', ['plain', 'qkv_bias', 'qk_norm', 'scaled'])
@pytest.mark.parametrize('window', [0, 6])
def test_what_transformers_reads_of_what_goes_out(kind, window):
  """Its own reading of our config.json, old keys and new, says the same."""
  fields = {'sliding_window': window}
  if kind == 'scaled':
    fields |= dict(
      rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
      rope_original_length=32,
    )  # fmt: skip
  elif kind != 'plain':
    fields[kind] = True
  cfg = dataclasses.replace(toy.MODEL.decoder, **fields)
  values = families.decoder_json(cfg)
  read_back = families.decoder_config(values, 'm')
  assert dataclasses.replace(read_back, max_length=cfg.max_length) == cfg
  theirs = transformers.AutoConfig.for_model(**values)
  assert (getattr(theirs, 'sliding_window', None) or 0) == window
  if kind in ('qkv_bias', 'qk_norm'):  # Qwen's layers may differ
    wanted = 'sliding_attention' if window else 'full_attention'
    assert set(theirs.layer_types) == {wanted}
  assert theirs.rope_parameters['rope_theta'] == cfg.rope_theta
  scaled = theirs.rope_parameters['rope_type'] == 'llama3'
  assert scaled == (kind == 'scaled')
  # transformers 4 has the scaling under its older name alone.
  older = {k: v for k, v in values.items() if k != 'rope_parameters'}
  assert families.decoder_config(older, 'm') == read_back


# --- Sources ------------------------------------------------------------------


@pytest.mark.parametrize(
  'values',
  [
    LLAMA | {'num_attention_heads': 0},
    LLAMA | {'rope_parameters': 3},
    LLAMA | {'model_type': 'qwen2', 'use_sliding_window': True,
             'max_window_layers': 'all'},
  ],
)  # fmt: skip
def test_nonsense_is_one_line(values):
  with pytest.raises(UserError, match='m: config.json cannot be right') as e:
    families.decoder_config(values, 'm')
  assert '\n' not in str(e.value)


def test_what_is_a_source(tmp_path, monkeypatch):
  """Runs have a config.json as well, and paths may look like hub names."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs' / 'a').mkdir(parents=True)
  (tmp_path / 'runs' / 'a' / 'config.json').write_text('{"config": {}}')
  for name in ('runs/a', 'runs/b', 'runs/my run', 'runs/', '@main/lm', 'x'):
    assert not sources.is_source(name), name
  write('llama', tmp_path / 'm')
  for name in (str(tmp_path / 'm'), 'a,b', 'org/model'):
    assert sources.is_source(name), name
  (tmp_path / 'm' / 'config.json').write_text('[]')
  with pytest.raises(UserError, match='is no JSON object'):
    sources.is_source(str(tmp_path / 'm'))


def test_pooling_of_sentence_encoders(tmp_path):
  assert families.pooling(str(tmp_path)) == 'cls'
  folder = tmp_path / '1_Pooling'
  folder.mkdir()
  for mode, kind in (('cls_token', 'cls'), ('mean_tokens', 'mean')):
    (folder / 'config.json').write_text(json.dumps({f'pooling_mode_{mode}': 1}))
    assert families.pooling(str(tmp_path)) == kind
  for kind in ('cls', 'mean'):  # newer files
    (folder / 'config.json').write_text(json.dumps({'pooling_mode': kind}))
    assert families.pooling(str(tmp_path)) == kind
  for values in (
    {'pooling_mode_max_tokens': True},
    {'pooling_mode_mean_tokens': True, 'pooling_mode_lasttoken': True},
    {'pooling_mode': 'max'},
    {},
  ):
    (folder / 'config.json').write_text(json.dumps(values))
    with pytest.raises(UserError, match='only pooling by cls or by mean'):
      families.pooling(str(tmp_path))


def test_a_pair_is_found_in_any_order(tmp_path):
  write('llama', tmp_path / 'd')
  write('roberta', tmp_path / 'e')
  for order in (('d', 'e'), ('e', 'd')):
    name = ','.join(str(tmp_path / part) for part in order)
    assert sources.is_source(name)
    source = sources.locate(name)
    assert source.paths == {
      'decoder': str(tmp_path / 'd'), 'encoder': str(tmp_path / 'e'),
    }  # fmt: skip
    config = toy.dataclasses.replace(
      config_of('llama')[1], encoder=config_of('roberta')[1].encoder
    )
    sources.check(source, config, {}, 'why')
    other = toy.replace('decoder', max_length=64, mlp_width=8)
    with pytest.raises(UserError, match='mlp_width is 8 in the config and 24'):
      sources.check(source, other, {}, 'why')
  both = f'{tmp_path / "d"},{tmp_path / "d"}'
  with pytest.raises(UserError, match='two models that are a decoder'):
    sources.locate(both)


def test_a_fingerprint_tells_models_apart(tmp_path):
  write('llama', tmp_path / 'a')
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')
  mark = lambda name: sources.fingerprint(sources.locate(str(tmp_path / name)))
  assert mark('a') == mark('b')
  path = pathlib.Path(tmp_path / 'b' / 'config.json')
  path.write_text(path.read_text().replace('0.001', '0.002'))
  assert mark('a') != mark('b')


@pytest.mark.parametrize('name', ['nowhere', './a/b', 'a/b/c', '~/x'])
def test_what_is_no_name(name):
  with pytest.raises(UserError, match='is no directory, and no name'):
    hub.resolve(name)


def _raises(monkeypatch, error):
  def download(*_, **__):
    raise error

  monkeypatch.setattr(hub.huggingface_hub, 'snapshot_download', download)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    (
      'GatedRepoError',
      'accept its licence at https://huggingface.co/org/model',
    ),
    ('RevisionNotFoundError', 'org/model has no version v1'),
    ('RepositoryNotFoundError', 'the hub has no org/model'),
    ('LocalEntryNotFoundError', 'hf download org/model'),
    ('HFValidationError', 'could not be fetched from the hub'),
  ],
)
def test_what_the_hub_answers(kind, message, monkeypatch):
  cls = getattr(hub.hub_errors, kind)
  error = cls.__new__(cls)
  _raises(monkeypatch, error)
  with pytest.raises(UserError, match=message):
    hub.resolve('org/model@v1')


def test_a_version_of_the_hub(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(
    hub.huggingface_hub,
    'snapshot_download',
    lambda name, revision, **_: asked.append((name, revision)) or str(tmp_path),
  )
  for name in ('org/a', 'org/a@v1', 'org/a@refs/pr/7'):
    assert hub.is_name(name) and hub.resolve(name) == str(tmp_path)
  assert asked == [('org/a', None), ('org/a', 'v1'), ('org/a', 'refs/pr/7')]
