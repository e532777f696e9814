"""GGUF files as llama.cpp's converter writes them, of our toy models."""

import json
import os

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
WORDS = ['Ġ', 'ĠĠ', 'a', 'b', 'ab', 'Ġa', *'0123456789', '<|end|>']
MERGES = ['Ġ Ġ', 'a b', 'Ġ a']


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
  """Rows of query or key with the two of a rotary pair side by side."""
  halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
  return halves.swapaxes(1, 2).reshape(weight.shape)


def name_of(theirs: str) -> str:
  """model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
  stem, _, kind = theirs.rpartition('.')
  layer = ''
  if stem.startswith('model.layers.'):
    _, _, number, stem = stem.split('.', 3)
    layer = f'blk.{number}.'
  return f'{layer}{NAMES[stem]}.{kind}'


def write(
  path, directory, kind='F32', drop=(), metadata=None, more=None, cut='smollm',
  pieces=None,
):  # fmt: skip
  """A Hugging Face directory's decoder as one file.

  Args:
    kind: of its matrices whose rows hold whole blocks.
    drop: names of tensors, as in the file, that are left out.
    metadata: more, or others, by their keys; None leaves one out.
    more: further tensors.
    cut: how the tokenizer cuts text, by llama.cpp's name.
    pieces: of a sentencepiece BPE in its place: (token, score, type) each.
  """
  with open(os.path.join(directory, 'config.json')) as f:
    config = json.load(f)
  arch = config['model_type']
  told = {
    f'{arch}.{key}': config[name]
    for key, name in {
      'block_count': 'num_hidden_layers',
      'context_length': 'max_position_embeddings',
      'embedding_length': 'hidden_size',
      'feed_forward_length': 'intermediate_size',
      'attention.head_count': 'num_attention_heads',
      'attention.head_count_kv': 'num_key_value_heads',
      'attention.key_length': 'head_dim',
      'rope.freq_base': 'rope_theta',
      'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
      'vocab_size': 'vocab_size',
    }.items()
  }
  told |= metadata or {}
  writer = gguf.GGUFWriter(str(path), told.pop('general.architecture', arch))
  for key, value in told.items():
    if isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif value is not None:
      writer.add_uint32(key, value)
  if pieces:
    tokens, scores, types = zip(*pieces)
    writer.add_tokenizer_model('llama')
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
  else:
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(WORDS)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types(
      [control if word.startswith('<') else normal for word in WORDS]
    )
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(WORDS.index('<|end|>'))
  writer.add_chat_template('{{ messages[0].content }}')
  kind = gguf.GGMLQuantizationType[kind]
  for name, array in load_file(f'{directory}/model.safetensors').items():
    if name_of(name) in drop:
      continue
    for which, heads in (('q', 'attention'), ('k', 'key_value')):
      if arch == 'llama' and f'{which}_proj' in name:
        array = interleaved(array, config[f'num_{heads}_heads'])
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if array.ndim == 2 and array.shape[1] % block == 0 and kind.name != 'F32':
      array = gguf.quantize(array, kind)
      writer.add_tensor(name_of(name), array, raw_dtype=kind)
    else:
      writer.add_tensor(name_of(name), np.ascontiguousarray(array))
  for name, array in (more or {}).items():
    writer.add_tensor(name, np.asarray(array, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


BERT_NAMES = {
  'embeddings.word_embeddings': 'token_embd',
  'embeddings.position_embeddings': 'position_embd',
  'embeddings.token_type_embeddings': 'token_types',
  'embeddings.LayerNorm': 'token_embd_norm',
  'attention.self.query': 'attn_q',
  'attention.self.key': 'attn_k',
  'attention.self.value': 'attn_v',
  'attention.output.dense': 'attn_output',
  'attention.output.LayerNorm': 'attn_output_norm',
  'intermediate.dense': 'ffn_up',
  'output.dense': 'ffn_down',
  'output.LayerNorm': 'layer_output_norm',
}


def write_bert(path, directory, words=None, special=True, pooling=1, **more):
  """A Hugging Face directory's encoder as one file.

  Args:
    words: WordPieces in order; None writes no tokenizer.
    special: whether those in brackets are marked as special, as they are in
      newer files.
    pooling: llama.cpp's number of it; None leaves it out.
    more: further metadata of the architecture; True and False as they are.
  """
  with open(os.path.join(directory, 'config.json')) as f:
    config = json.load(f)
  arrays = load_file(f'{directory}/model.safetensors')
  offset = 0
  if config['model_type'] != 'bert':  # llama.cpp leaves these rows out
    offset = config['pad_token_id'] + 1
  writer = gguf.GGUFWriter(str(path), 'bert')
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_context_length(config['max_position_embeddings'] - offset)
  writer.add_embedding_length(config['hidden_size'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_layer_norm_eps(config['layer_norm_eps'])
  writer.add_causal_attention(more.pop('causal', False))
  if pooling is not None:
    writer.add_pooling_type(gguf.PoolingType(pooling))
  if words:
    inside = lambda word: word.startswith('[') and word.endswith(']')
    spell = lambda word: (
      word if inside(word) else
      word[2:] if word.startswith('##') else f'\u2581{word}'
    )  # fmt: skip
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model('bert')
    writer.add_token_list([spell(word) for word in words])
    writer.add_token_types([kinds[special and inside(word)] for word in words])
    writer.add_pad_token_id(words.index('[PAD]'))
  else:
    writer.add_vocab_size(config['vocab_size'])
  for name, array in arrays.items():
    stem, _, kind = name.rpartition('.')
    layer = ''
    if stem.startswith('encoder.layer.'):
      _, _, number, stem = stem.split('.', 3)
      layer = f'blk.{number}.'
    if stem not in BERT_NAMES:
      continue
    if stem == 'embeddings.position_embeddings':
      array = array[offset:]
    writer.add_tensor(
      f'{layer}{BERT_NAMES[stem]}.{kind}', np.ascontiguousarray(array)
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
