"""llama.cpp's files as a source of weights, numbers and tokenizer."""

import dataclasses
import json
import os
import pathlib
import shutil

import gguf as library
import gguf_files
import hf_directories as hf
import jax
import numpy as np
import pytest
import real_models
import sentencepiece
import toy

from refrag_jax import sharding
from refrag_jax.data import tokenizers
from refrag_jax.errors import UserError
from refrag_jax.hf import convert, gguf, hub, sources


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  hub.resolve.cache_clear()
  tokenizers.load.cache_clear()


@pytest.fixture
def made(tmp_path):
  """A function that writes a family's toy model both ways."""

  def write(name='llama', **how):
    hf.write(name, tmp_path / 'hf')
    path = str(tmp_path / 'model.gguf')
    gguf_files.write(path, str(tmp_path / 'hf'), **how)
    return path

  return write


@pytest.mark.parametrize('name', ['llama', 'tied', 'qwen2', 'qwen3'])
def test_it_is_the_model_that_it_was_made_of(name, made, tmp_path):
  """Rows of query and key are where Hugging Face has them, on any mesh."""
  path = made(name)
  assert sources.is_source(path) and not hub.is_name(path)
  assert hf.of_directory(hub.resolve(path)) == hf.of_directory(tmp_path / 'hf')
  mesh = sharding.make_mesh(2, 2, 2)
  wanted = hf.abstract(name, mesh)
  expected = convert.read_params(str(tmp_path / 'hf'), wanted)
  found = sources.read(sources.locate(path), {'decoder': wanted})['decoder']
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_way_out_and_in_again_is_bitwise(made, tmp_path):
  path = made('wide', kind='Q8_0')
  wanted = hf.abstract('wide', sharding.make_mesh(2, 2, 2))
  first = convert.read_params(hub.resolve(path), wanted)
  config = convert.families.read_config(hub.resolve(path))
  os.mkdir(tmp_path / 'out')
  kinds = convert.dtypes(hub.resolve(path))
  convert.write_params(str(tmp_path / 'out'), 'decoder', first, config, kinds)
  again = convert.read_params(str(tmp_path / 'out'), wanted)
  jax.tree.map(np.testing.assert_array_equal, first, again)


def blocks(kind, rows, columns, rng):
  """Random numbers of a kind: bytes, with scales that are finite."""
  size, length = library.GGML_QUANT_SIZES[kind]
  if kind.name in ('F32', 'F16', 'BF16') or 'K' not in kind.name:
    return library.quantize(
      rng.standard_normal((rows, columns)).astype(np.float32), kind
    )
  data_RN = rng.integers(0, 256, (rows, columns // size, length), np.uint8)
  scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
  # The scales of a block of Q4_K and Q5_K come first, of the others last.
  where = slice(0, 2) if kind.name in ('Q4_K', 'Q5_K') else slice(-2, None)
  data_RN[..., where] = scale
  if kind.name in ('Q2_K', 'Q4_K', 'Q5_K'):
    where = slice(2, 4) if kind.name != 'Q2_K' else slice(-4, -2)
    data_RN[..., where] = scale
  return data_RN.reshape(rows, -1)


@pytest.mark.parametrize('kind', gguf.KINDS)
def test_ranges_of_each_kind_are_those_of_the_whole(kind, tmp_path):
  kind = library.GGMLQuantizationType[kind]
  data = blocks(kind, 8, 512, np.random.default_rng(0))
  path = str(tmp_path / 'one.gguf')
  writer = library.GGUFWriter(path, 'llama')
  dtype = {} if kind.name in ('F32', 'F16') else {'raw_dtype': kind}
  writer.add_tensor('blk.0.attn_q.weight', data, **dtype)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  whole = library.dequantize(
    data if dtype else data.astype(np.float32), kind
  ) if dtype else data  # fmt: skip
  assert np.isfinite(whole).all() and np.unique(whole).size > 8
  (tensor,) = library.GGUFReader(path).tensors
  plain = gguf.Slice(tensor, kind.name, 0)
  assert plain.shape == (8, 512)
  np.testing.assert_array_equal(plain[...], whole)
  np.testing.assert_array_equal(plain[2:5, 7:300], whole[2:5, 7:300])
  # Two heads of four rows: the first rows of the pairs, then the second ones.
  turned = gguf.Slice(tensor, kind.name, 2)
  order = [0, 2, 1, 3, 4, 6, 5, 7]
  np.testing.assert_array_equal(turned[...], whole[order])
  np.testing.assert_array_equal(turned[1:6, 9:], whole[order][1:6, 9:])


def test_its_tokenizer_is_in_there(made):
  path = made()
  found = tokenizers.load(path)
  assert found.vocab_size == len(gguf_files.WORDS)
  words = lambda text: [gguf_files.WORDS[i] for i in found.encode(text)[0]]
  assert words('ab a') == ['ab', 'Ġa']
  # SmolLM cuts at digits first: both spaces before one are one token.
  assert words('a  12') == ['a', 'ĠĠ', '1', '2']
  assert found.eos_id == gguf_files.WORDS.index('<|end|>')
  assert 'chat_template.jinja' in os.listdir(hub.resolve(path))


@pytest.mark.parametrize(
  ('cut', 'text', 'expected'),
  [
    ('gpt-2', 'a  12', ['a', 'Ġ', 'Ġ', '1', '2']),
    ('smollm', 'a  12', ['a', 'ĠĠ', '1', '2']),
    ('llama-bpe', 'ab  a', ['ab', 'Ġ', 'Ġa']),
    ('qwen2', 'ab  a', ['ab', 'Ġ', 'Ġa']),
  ],
)
def test_text_is_cut_as_the_file_says(cut, text, expected, made):
  found = tokenizers.load(made(cut=cut))
  assert [gguf_files.WORDS[i] for i in found.encode(text)[0]] == expected
  assert found.decode(found.encode(text)[0]) == text


def test_an_unknown_way_of_cutting_is_refused(made):
  with pytest.raises(UserError, match="text cut as 'other'.*tokenizer.json"):
    hub.resolve(made(cut='other'))


def test_sentencepiece_is_what_it_was(made):
  """Llama 2's, taken apart and put together again."""
  source = real_models.shared('tokenizers')
  if source is None:
    pytest.skip('needs the real tokenizers')
  model = sentencepiece.SentencePieceProcessor(
    model_file=str(source / 'llama2' / 'tokenizer.model')
  )
  kinds = (
    (model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5),
    (model.is_byte, 6),
  )  # fmt: skip
  pieces = [
    (
      model.id_to_piece(i),
      model.get_score(i),
      next((kind for test, kind in kinds if test(i)), 1),
    )
    for i in range(model.vocab_size())
  ]
  found = tokenizers.load(made(pieces=pieces))
  assert (found.bos_id, found.eos_id) == (1, 2)
  texts = [
    'A report of 2024 says:  naïve models, 3.14 times.\n\n\tIndented.',
    ' starts with a space', 'ends with two  ', '日本語 and <s> and 😀', '',
    *(real_models.lines(400) or []),
  ]  # fmt: skip
  for text in texts:
    assert list(found.encode(text)[0]) == model.encode(text), text


def test_a_tokenizer_beside_it_goes_first(made, tmp_path):
  path = made()
  other = os.path.join(hub.resolve(path), 'tokenizer.json')
  saved = json.loads(pathlib.Path(other).read_text())
  ids = saved['model']['vocab']
  ids['a'], ids['b'] = ids['b'], ids['a']
  (tmp_path / 'tokenizer.json').write_text(json.dumps(saved))
  shutil.copy(os.path.join(os.path.dirname(other), 'tokenizer_config.json'),
              tmp_path)  # fmt: skip
  hub.resolve.cache_clear()
  tokenizers.load.cache_clear()
  assert tokenizers.load(path).encode('b')[0] == gguf_files.WORDS.index('a')


def test_llama_3s_scaling_is_found_in_its_tensor(made, tmp_path):
  """Its numbers are in no metadata; others than Llama 3's are refused."""
  scaling = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )
  _, cfg, _ = hf.write('llama', tmp_path / 'of')
  ours = dataclasses.replace(
    cfg,
    rope_factor=8.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_length=8192,
    rope_theta=1e9,
  )
  factors = gguf.llama3_factors(1e9, cfg.head_dim, scaling)
  metadata = {'llama.rope.freq_base': 1e9}
  path = made(metadata=metadata, more={gguf.ROPE_FACTORS: factors})
  assert hf.of_directory(hub.resolve(path)) == ours
  hub.resolve.cache_clear()
  shutil.rmtree(tmp_path / 'hf')
  path = made(metadata=metadata, more={gguf.ROPE_FACTORS: factors + 1})
  with pytest.raises(UserError, match="not those of Llama 3's"):
    hub.resolve(path)


WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'ab', 'a', '##b', '1']


@pytest.mark.parametrize('name', ['bert', 'roberta'])
def test_an_encoder_is_the_model_that_it_was_made_of(name, tmp_path):
  """RoBERTa's positions begin where BERT's do: the rows before are cut off."""
  hf.write(name, tmp_path / 'hf')
  path = str(tmp_path / 'model.gguf')
  gguf_files.write_bert(path, tmp_path / 'hf')
  ours = sources.locate(path).numbers['encoder']
  theirs = hf.of_directory(tmp_path / 'hf')
  offset = theirs.position_offset
  assert ours == dataclasses.replace(theirs, pooling='mean', position_offset=0)
  expected = convert.read_params(
    str(tmp_path / 'hf'), hf.abstract(name, sharding.make_mesh(2, 2, 2))
  )
  wanted = hf.tree_of(
    toy.replace('encoder', **dataclasses.asdict(ours)),
    sharding.make_mesh(2, 2, 2),
    'encoder',
  )
  found = sources.read(sources.locate(path), {'encoder': wanted})['encoder']
  expected['position_embeddings'] = expected['position_embeddings'][offset:]
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('special', [True, False])
def test_wordpieces_are_spelt_as_bert_spells_them(special, tmp_path):
  hf.write('bert', tmp_path / 'hf')
  path = str(tmp_path / 'model.gguf')
  gguf_files.write_bert(path, tmp_path / 'hf', WORDS, special)
  found = tokenizers.load(path)
  words = lambda text: [WORDS[i] for i in found.encode(text)[0]]
  assert words('abb Ab a1 [CLS]') == [
    'ab', '##b', 'ab', '[UNK]', '[UNK]', '[UNK]', '[UNK]',
  ]  # fmt: skip
  assert (found.pad_id, found.cls_id, found.sep_id, found.mask_id) == (
    0, 2, 3, 4,
  )  # fmt: skip
  hub.resolve.cache_clear()
  tokenizers.load.cache_clear()
  gguf_files.write_bert(path, tmp_path / 'hf', [*WORDS, 'A'])
  assert list(tokenizers.load(path).encode('A a Ab')[0]) == [9, 6, 9, 7]


@pytest.mark.parametrize(
  ('how', 'sentence'),
  [
    (dict(causal=True), 'causal is on; REFRAG takes encoders'),
    (dict(pooling=3), 'only pooling by cls or by mean is supported, not last'),
  ],
)
def test_what_is_no_such_encoder_is_one_sentence(how, sentence, tmp_path):
  hf.write('bert', tmp_path / 'hf')
  path = str(tmp_path / 'model.gguf')
  gguf_files.write_bert(path, tmp_path / 'hf', **how)
  with pytest.raises(UserError, match=sentence):
    sources.locate(path)


REFUSED = {
  'another architecture': (
    dict(metadata={'general.architecture': 'gpt2'}),
    "is a model of architecture 'gpt2'.* there are llama, qwen2, qwen3",
  ),
  'experts': (
    dict(metadata={'llama.expert_count': 8}),
    'is a mixture of experts',
  ),
  'a number missing': (
    dict(metadata={'llama.block_count': None}),
    'has no single llama.block_count',
  ),
  'scaled positions': (
    dict(metadata={'llama.rope.scaling.type': 'yarn'}),
    "rotary positions scaled by 'yarn'",
  ),
  'half of a head turned': (
    dict(metadata={'llama.rope.dimension_count': 2}),
    'rope.dimension_count is 2 and not the',
  ),
  'a tensor missing': (
    dict(drop=('blk.1.ffn_up.weight',)),
    'lacks 1 tensors .* layers.1.mlp.up_proj.weight',
  ),
  'a kind that nobody reads': (dict(kind='MXFP4'), 'of kind MXFP4'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_read_is_one_sentence(case, made):
  how, sentence = REFUSED[case]
  wanted = {'decoder': hf.abstract('wide', sharding.make_mesh(2, 2, 2))}
  path = made('wide', **how)
  with pytest.raises(UserError, match=sentence):
    sources.read(sources.locate(path), wanted)


def test_a_damaged_file_is_named(made, tmp_path):
  path = made()
  whole = pathlib.Path(path).read_bytes()
  for length in (0, 3, 40, len(whole) // 2, len(whole) - 40):
    with open(path, 'wb') as f:
      f.write(whole[:length])
    with pytest.raises(UserError, match='model.gguf is damaged or cut off'):
      gguf.unpack(path)
  with open(path, 'wb') as f:
    f.write(b'version https://git-lfs.github.com/spec/v1\n' + whole)
  with pytest.raises(UserError, match='is a Git LFS pointer'):
    gguf.unpack(path)
  os.remove(path)
  with pytest.raises(UserError, match='is not there'):
    sources.locate(path)
  assert not os.path.exists(tmp_path / 'cache' / 'refrag_jax' / 'gguf') or (
    os.listdir(tmp_path / 'cache' / 'refrag_jax' / 'gguf') == []
  )


def test_one_of_several_files_needs_the_others(made, tmp_path):
  path = made()
  first = str(tmp_path / 'model-00001-of-00002.gguf')
  shutil.move(path, first)
  with pytest.raises(UserError, match='missing: model-00002-of-00002.gguf'):
    sources.locate(first)


def test_a_directory_with_one_file_stands_for_it(made, tmp_path):
  path = made()
  os.mkdir(tmp_path / 'only')
  shutil.copy(path, tmp_path / 'only' / 'a.gguf')
  assert sources.is_source(str(tmp_path / 'only'))
  source = sources.locate(str(tmp_path / 'only'))
  assert source.numbers['decoder'].width == toy.MODEL.decoder.width
  shutil.copy(path, tmp_path / 'only' / 'b.gguf')
  hub.resolve.cache_clear()
  with pytest.raises(UserError, match='2 GGUF files: name the one'):
    sources.locate(str(tmp_path / 'only'))
