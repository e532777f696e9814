"""Models in llama.cpp's GGUF files; the only file that imports gguf.

A file becomes a directory as Hugging Face has them, in the cache: config.json
and tokenizer made from its metadata, beside a link to the file itself. Its
tensors are read from there by range and dequantized as they are read, so that
no second copy of the weights lies on disk.

llama.cpp turns pairs of rotary positions that lie side by side, Hugging Face's
models such that lie half a head apart: of its `llama` files the rows of query
and key are put back. Its `bert` is also what RoBERTa and XLM-R become, without
the rows that their positions begin behind.

Dimension key: Y layers.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from refrag_jax.errors import UserError
from refrag_jax.runtime import environment
from refrag_jax.runtime.paths import refuse_pointer

SUFFIX = '.gguf'
FORMAT = 2  # of what lies in the cache; another one is made anew
SPLIT = re.compile(r'-(\d{5})-of-(\d{5})\.gguf$')
# Kinds of tensors, and what an export of them is written in.
KINDS = {'F32': 'F32', 'F16': 'F16', 'BF16': 'BF16'} | dict.fromkeys(
  (
    'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1',
    'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K',
  ),
  'F32',
)  # fmt: skip
PERMUTED = re.compile(r'^blk\.\d+\.attn_(q|k)\.')  # in `llama` files
ROPE_FACTORS = 'rope_freqs.weight'  # Llama 3's scaling of rotary positions
_DECODER_NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'ffn_norm': 'post_attention_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_BERT_NAMES = {
  'token_embd': 'embeddings.word_embeddings',
  'position_embd': 'embeddings.position_embeddings',
  'token_types': 'embeddings.token_type_embeddings',
  'token_embd_norm': 'embeddings.LayerNorm',
  'attn_q': 'attention.self.query',
  'attn_k': 'attention.self.key',
  'attn_v': 'attention.self.value',
  'attn_output': 'attention.output.dense',
  'attn_output_norm': 'attention.output.LayerNorm',
  'ffn_up': 'intermediate.dense',
  'ffn_down': 'output.dense',
  'layer_output_norm': 'output.LayerNorm',
}
_TOKENIZER = ('tokenizer.json', 'tokenizer.model')


def is_file(name: str) -> bool:
  """Whether this is written like the path of such a file."""
  return name.endswith(SUFFIX)


def in_directory(directory: str) -> str:
  """The one GGUF file of a directory without config.json; '' if none.

  Raises:
    UserError: there are several.
  """
  names = os.listdir(directory)
  found = sorted(name for name in names if is_file(name))
  if not found or 'config.json' in names:
    return ''
  first = SPLIT.sub('', found[0])
  if any(SPLIT.sub('', name) != first for name in found[1:]):
    raise UserError(
      f'{directory} holds {len(found)} GGUF files: name the one that is meant, '
      f'such as {os.path.join(directory, found[0])}'
    )
  return os.path.join(directory, found[0])


def unpack(path: str) -> str:
  """The directory in the cache that stands for a GGUF file.

  A tokenizer.json or tokenizer.model beside the file is taken before the one
  in its metadata.

  Raises:
    UserError: there is no such file, a part of several is missing, it is
      damaged, or of an architecture that is none of ours.
  """
  parts = _parts(path)
  beside = _tokenizer_beside(path)
  told = [os.stat(part) for part in [*parts, *beside]]
  key = [
    [os.path.realpath(part) for part in [*parts, *beside]],
    [(info.st_size, info.st_mtime_ns) for info in told],
    FORMAT,
  ]
  mark = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  stem = os.path.basename(path).removesuffix(SUFFIX)
  target = os.path.join(
    environment.cache_dir(os.environ, 'gguf'), f'{stem}-{mark}'
  )
  if os.path.isdir(target):
    return target
  os.makedirs(os.path.dirname(target), exist_ok=True)
  with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as made:
    inner = os.path.join(made, 'model')
    os.mkdir(inner)
    _write(inner, path, parts, beside)
    try:
      os.rename(inner, target)
    except OSError:
      if not os.path.isdir(target):  # else another process was first
        raise
  return target


def _parts(path: str) -> list[str]:
  """The files of a model, which may be one of several."""
  if not os.path.isfile(path):
    raise UserError(
      f'{path} is not there, or no file (launch/models.sh fetches the pair of '
      'configs/smollm2.py)'
    )
  found = SPLIT.search(path)
  if found is None:
    return [path]
  count, stem = int(found[2]), path[: found.start()]
  parts = [f'{stem}-{i + 1:05d}-of-{count:05d}{SUFFIX}' for i in range(count)]
  missing = [os.path.basename(p) for p in parts if not os.path.isfile(p)]
  if missing:
    raise UserError(
      f'{path} is one of {count} files, of which there are missing: '
      f'{", ".join(missing)}'
    )
  return parts


def _tokenizer_beside(path: str) -> list[str]:
  directory = os.path.dirname(path)
  there = lambda name: os.path.exists(os.path.join(directory, name))
  if not any(map(there, _TOKENIZER)):
    return []
  more = ('tokenizer_config.json', 'special_tokens_map.json',
          'chat_template.jinja', 'generation_config.json')  # fmt: skip
  return [
    os.path.join(directory, name)
    for name in (*_TOKENIZER, *more)
    if there(name)
  ]


def _write(
  directory: str, path: str, parts: list[str], beside: list[str]
) -> None:
  reader = _open(parts[0])
  tensors = {tensor.name: tensor for p in parts for tensor in _open(p).tensors}
  config = _config(reader, tensors, path)
  for i, part in enumerate(parts):
    os.symlink(
      os.path.realpath(part), os.path.join(directory, f'model-{i:05d}{SUFFIX}')
    )
  with open(os.path.join(directory, 'config.json'), 'w') as f:
    json.dump(config, f, indent=1)
  if config['model_type'] == 'bert':
    _write_pooling(directory, _metadata(reader, 'bert.pooling_type', 0))
  for file in beside:
    os.symlink(
      os.path.realpath(file), os.path.join(directory, os.path.basename(file))
    )
  if not beside:
    _write_tokenizer(directory, reader, parts[0])


def _open(path: str) -> gguf.GGUFReader:
  refuse_pointer(path)
  info = os.stat(path)
  return _read(path, info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # some seconds of Python for a vocabulary
def _read(path: str, size: int, changed: int) -> gguf.GGUFReader:
  del size, changed  # another file by that name is read anew
  try:
    return gguf.GGUFReader(path)
  except Exception as e:  # whatever it trips over, the file is at fault
    reason = str(e).strip().split('\n')[0][:200]
    raise UserError(
      f'{path} is damaged or cut off ({reason}): download it again'
    ) from None


def _metadata(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
  field = reader.get_field(key)
  return default if field is None else field.contents()


# --- config.json --------------------------------------------------------------


Tensors = Mapping[str, gguf.ReaderTensor]  # by their names in the file


def _config(
  reader: gguf.GGUFReader, tensors: Tensors, path: str
) -> dict[str, Any]:
  """config.json of the model, from the file's metadata."""
  kind = _metadata(reader, 'general.architecture', '?')
  if kind not in ARCHITECTURES:
    raise UserError(
      f'{path} is a model of architecture {kind!r}, which is not supported; '
      f'there are {", ".join(ARCHITECTURES)}'
    )

  def needed(key: str) -> Any:
    value = _metadata(reader, f'{kind}.{key}')
    if not isinstance(value, (int, float)) or not value:
      raise UserError(f'{path} has no single {kind}.{key} in its metadata')
    return value

  tokens = reader.get_field('tokenizer.ggml.tokens')
  told = _metadata(reader, f'{kind}.vocab_size')
  vocab_size = told or (len(tokens.data) if tokens else 0)
  if not vocab_size:
    raise UserError(f'{path} does not say how large its vocabulary is')
  return {
    'model_type': kind,
    'vocab_size': vocab_size,
    'hidden_size': needed('embedding_length'),
    'intermediate_size': needed('feed_forward_length'),
    'num_hidden_layers': needed('block_count'),
    'num_attention_heads': needed('attention.head_count'),
    **{
      f'{name}_token_id': int(found)
      for name, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
      if (found := _metadata(reader, f'tokenizer.ggml.{key}_token_id'))
      is not None
    },
    **ARCHITECTURES[kind](reader, needed, tensors, path, kind),
  }


def _decoder_config(
  reader, needed, tensors: Tensors, path: str, kind: str
) -> dict[str, Any]:
  read = lambda key, default=None: _metadata(reader, f'{kind}.{key}', default)
  if read('expert_count', 0):
    raise UserError(f'{path} is a mixture of experts, which is not supported')
  heads = needed('attention.head_count')
  head_dim = read('attention.key_length') or needed('embedding_length') // heads
  for key in ('attention.value_length', 'rope.dimension_count'):
    if read(key, head_dim) != head_dim:
      raise UserError(
        f'{path}: {kind}.{key} is {read(key)} and not the {head_dim} of a '
        'head, which is not supported'
      )
  return {
    'architectures': [f'{kind.capitalize()}ForCausalLM'],
    'num_key_value_heads': read('attention.head_count_kv') or heads,
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'rms_norm_eps': _decimal(needed('attention.layer_norm_rms_epsilon')),
    'tie_word_embeddings': 'output.weight' not in tensors,
    'max_position_embeddings': needed('context_length'),
    **_rope(read, tensors, head_dim, path),
  }


def _bert_config(
  reader, needed, tensors: Tensors, path: str, kind: str
) -> dict[str, Any]:
  if _metadata(reader, f'{kind}.attention.causal', False):
    raise UserError(
      f'{path}: {kind}.attention.causal is on; REFRAG takes encoders, which '
      'look both ways'
    )
  rows = {}
  for name in ('position_embd', 'token_types'):
    if f'{name}.weight' not in tensors:
      raise UserError(f'{path} lacks the tensor {name}.weight')
    rows[name] = int(tensors[f'{name}.weight'].shape[1])
  return {
    'architectures': ['BertModel'],
    'hidden_act': 'gelu',
    'layer_norm_eps': _decimal(needed('attention.layer_norm_epsilon')),
    'max_position_embeddings': rows['position_embd'],
    'type_vocab_size': rows['token_types'],
  }


ARCHITECTURES = {  # each a family of families.py
  **dict.fromkeys(('llama', 'qwen2', 'qwen3'), _decoder_config),
  'bert': _bert_config,
}


def _write_pooling(directory: str, kind: int) -> None:
  """How one vector is made of all, as sentence encoders say it."""
  found = gguf.PoolingType(kind).name
  if found == 'NONE':
    return
  named = 'sentence_transformers.models.'
  modules = [
    {'idx': 0, 'name': '0', 'path': '', 'type': f'{named}Transformer'},
    {'idx': 1, 'name': '1', 'path': '1_Pooling', 'type': f'{named}Pooling'},
  ]
  with open(os.path.join(directory, 'modules.json'), 'w') as f:
    json.dump(modules, f, indent=1)
  os.mkdir(os.path.join(directory, '1_Pooling'))
  with open(os.path.join(directory, '1_Pooling', 'config.json'), 'w') as f:
    json.dump({'pooling_mode': found.lower()}, f)


def _decimal(value: float) -> float:
  """1e-05 of a float32 that is 9.999999747378752e-06 as a double."""
  return float(str(np.float32(value)))


def _rope(read, tensors: Tensors, head_dim: int, path: str) -> dict[str, Any]:
  """Base and scaling of rotary positions.

  Llama 3's scaling is not in the metadata but in a tensor, the factor of each
  frequency; the numbers that it was made from are found again by trying those
  that Llama 3 has (1 and 4, of 8,192 positions).
  """
  theta = _decimal(read('rope.freq_base', 10_000.0))
  kind = read('rope.scaling.type', 'none')
  if kind not in ('none', 'linear') or read('rope.scaling.factor', 1.0) != 1.0:
    # families.py says that it is not supported.
    return {'rope_theta': theta, 'rope_scaling': {'rope_type': kind}}
  if ROPE_FACTORS not in tensors:
    return {'rope_theta': theta}
  factors = np.asarray(tensors[ROPE_FACTORS].data, np.float64)
  scaling = {
    'rope_type': 'llama3',
    'factor': round(float(factors.max()), 3),
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  if not np.allclose(factors, llama3_factors(theta, head_dim, scaling), 1e-4):
    raise UserError(
      f'{path} scales its rotary positions by {ROPE_FACTORS}, whose numbers '
      "are not those of Llama 3's scaling: that is not supported"
    )
  return {'rope_theta': theta, 'rope_scaling': scaling}


def llama3_factors(
  theta: float, head_dim: int, scaling: Mapping[str, Any]
) -> np.ndarray:
  """What each frequency is divided by, (head_dim / 2,)."""
  length = scaling['original_max_position_embeddings']
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
  return 1 / ((1 - smooth) / scaling['factor'] + smooth)


# --- Tokenizer ----------------------------------------------------------------

# How text is cut before BPE's merges, by the name that llama.cpp gives it.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False}
_GPT2 = [_BYTES | {'use_regex': True}]


def _split(digits: int) -> list[dict[str, Any]]:
  pattern = {'Regex': _WORDS % digits}
  return [
    {
      'type': 'Split',
      'pattern': pattern,
      'behavior': 'Isolated',
      'invert': False,
    },
    _BYTES | {'use_regex': False},
  ]


_CUT = {
  **dict.fromkeys(('default', 'gpt-2'), _GPT2),
  'smollm': [{'type': 'Digits', 'individual_digits': True}, *_GPT2],
  **dict.fromkeys(('llama-bpe', 'llama3', 'llama-v3'), _split(3)),
  **dict.fromkeys(('qwen2', 'deepseek-r1-qwen'), _split(1)),
}
_SPECIAL = {
  'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding',
  'sep': 'seperator', 'mask': 'mask',
}  # fmt: skip
_BERT_SPECIAL = {
  'pad': '[PAD]', 'unk': '[UNK]', 'cls': '[CLS]', 'sep': '[SEP]',
  'mask': '[MASK]',
}  # fmt: skip
_NORMAL, _CONTROL, _USER = 1, 3, 4  # types of tokens, as sentencepiece has them
_BPE, _NO_NORMALIZER = 2, 'identity'
_BEGINS = '\u2581'  # before the tokens of a `bert` file that begin a word


def _write_tokenizer(
  directory: str, reader: gguf.GGUFReader, path: str
) -> None:
  """What the metadata says of the tokenizer, in the files of the other kind.

  tokenizer.json for byte-level BPE and WordPiece, tokenizer.model for
  sentencepiece.

  Raises:
    UserError: it is of another kind, or cuts text in a way unknown here.
  """
  read = lambda key, default=None: _metadata(
    reader, f'tokenizer.ggml.{key}', default
  )
  tokens = read('tokens')
  if not tokens:
    return  # a config may name one from elsewhere
  kind, cut = read('model', '?'), read('pre', 'default')
  types = read('token_type') or [_NORMAL] * len(tokens)
  if kind == 'gpt2' and cut in _CUT:
    with open(os.path.join(directory, 'tokenizer.json'), 'w') as f:
      json.dump(_byte_level(tokens, types, read('merges'), cut), f)
  elif kind == 'bert':
    tokens = _pieces(tokens, types)
    with open(os.path.join(directory, 'tokenizer.json'), 'w') as f:
      json.dump(_wordpiece(tokens), f)
  elif kind == 'llama' and read('scores'):
    prefix = read('add_space_prefix', True)
    with open(os.path.join(directory, 'tokenizer.model'), 'wb') as f:
      f.write(_sentencepiece(tokens, read('scores'), types, prefix))
  else:
    raise UserError(
      f'{path} has a tokenizer of kind {kind!r}, text cut as {cut!r}, which is '
      'not known here: put the tokenizer.json of the model beside it'
    )
  config = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  for name, key in _SPECIAL.items():
    number = read(f'{key}_token_id')
    if number is not None and 0 <= number < len(tokens):
      config[f'{name}_token'] = tokens[number]
  if kind == 'bert':  # whose files may leave some out
    config |= {
      f'{name}_token': word
      for name, word in _BERT_SPECIAL.items()
      if word in tokens
    }
  with open(os.path.join(directory, 'tokenizer_config.json'), 'w') as f:
    json.dump(config, f, indent=1)
  template = _metadata(reader, 'tokenizer.chat_template')
  if template:
    with open(
      os.path.join(directory, 'chat_template.jinja'), 'w', encoding='utf-8'
    ) as f:
      f.write(template)


def _byte_level(
  tokens: list[str], types: list[int], merges: list[str], cut: str
) -> dict[str, Any]:
  """tokenizer.json of byte-level BPE."""
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      _added(i, token, kind == _CONTROL)
      for i, (token, kind) in enumerate(zip(tokens, types))
      if kind in (_CONTROL, _USER)
    ],
    'normalizer': {'type': 'NFC'} if 'qwen' in cut else None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': _CUT[cut]},
    'post_processor': None,
    'decoder': _BYTES | {'use_regex': True},
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': None,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': False,
      # Llama 3's: a word of the vocabulary is taken whole.
      'ignore_merges': _CUT[cut] == _split(3),
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': merges,
    },
  }


def _pieces(tokens: list[str], types: list[int]) -> list[str]:
  """WordPieces as BERT spells them.

  llama.cpp marks the beginning of a word, BERT what continues it. It leaves
  special tokens alone, which older files have as tokens in brackets.
  """
  out = []
  for token, kind in zip(tokens, types):
    if token.startswith(_BEGINS) and kind != _CONTROL:
      out.append(token.removeprefix(_BEGINS))
    elif kind == _CONTROL or re.fullmatch(r'\[.+\]', token):
      out.append(token)
    else:
      out.append(f'##{token}')
  return out


def _wordpiece(tokens: list[str]) -> dict[str, Any]:
  """tokenizer.json of WordPiece."""
  special = [word for word in _BERT_SPECIAL.values() if word in tokens]
  # The file does not say it: one that keeps capitals has some.
  words = (token for token in tokens if token not in special)
  cased = any(re.match(r'(##)?[A-Z]', token) for token in words)
  around = [
    {'SpecialToken': {'id': '[CLS]', 'type_id': 0}},
    {'Sequence': {'id': 'A', 'type_id': 0}},
    {'SpecialToken': {'id': '[SEP]', 'type_id': 0}},
  ]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      _added(tokens.index(word), word, True) for word in special
    ],
    'normalizer': {
      'type': 'BertNormalizer',
      'clean_text': True,
      'handle_chinese_chars': True,
      'strip_accents': None,
      'lowercase': not cased,
    },
    'pre_tokenizer': {'type': 'BertPreTokenizer'},
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': around,
      'pair': around,
      'special_tokens': {
        word: {'id': word, 'ids': [tokens.index(word)], 'tokens': [word]}
        for word in ('[CLS]', '[SEP]')
      },
    },
    'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
    'model': {
      'type': 'WordPiece',
      'unk_token': '[UNK]',
      'continuing_subword_prefix': '##',
      'max_input_chars_per_word': 100,
      'vocab': {token: i for i, token in enumerate(tokens)},
    },
  }


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
  """An entry of added_tokens in tokenizer.json."""
  return {
    'id': number,
    'content': token,
    'single_word': False,
    'lstrip': False,
    'rstrip': False,
    'normalized': False,
    'special': special,
  }


def _sentencepiece(
  tokens: list[str], scores: list[float], types: list[int], prefix: bool
) -> bytes:
  """ModelProto of a sentencepiece BPE, in the wire format of protobuf."""

  def varint(n: int) -> bytes:
    out = b''
    while n > 127:
      out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])

  def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
      return varint(number << 3 | 5) + np.float32(value).tobytes()
    if isinstance(value, int):
      return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value

  pieces = b''.join(
    field(
      1,
      field(1, token.encode()) + field(2, float(score)) + field(3, int(kind)),
    )
    for token, score, kind in zip(tokens, scores, types)
  )
  trainer = field(3, _BPE) + field(35, 1)  # model_type, byte_fallback
  # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
  normalizer = field(1, _NO_NORMALIZER.encode()) + field(3, int(prefix))
  normalizer += field(4, 0) + field(5, 1)
  return pieces + field(2, trainer) + field(3, normalizer)


# --- Tensors ------------------------------------------------------------------


class Files:
  """The tensors of a directory that `unpack` made, as convert.Files has them.

  By Hugging Face's names and in its order of rows, dequantized to float32.
  """

  def __init__(self, directory: str):
    """Reads the headers.

    Raises:
      UserError: a file is damaged, or holds a kind of numbers that is none of
        KINDS.
    """
    self.directory = directory
    parts = [_open(os.path.join(directory, name)) for name in files(directory)]
    with open(os.path.join(directory, 'config.json')) as f:
      config = json.load(f)
    self._tensors = {}
    for tensor in (tensor for part in parts for tensor in part.tensors):
      if tensor.name == ROPE_FACTORS:
        continue
      kind = tensor.tensor_type.name
      if kind not in KINDS:
        raise UserError(
          f'{directory}: {tensor.name} is of kind {kind}, which is none of '
          f'{", ".join(KINDS)}'
        )
      heads = 0
      if config['model_type'] == 'llama' and PERMUTED.match(tensor.name):
        which = 'attention' if '.attn_q.' in tensor.name else 'key_value'
        heads = config[f'num_{which}_heads']
      name = _name(tensor.name, config['model_type'])
      self._tensors[name] = Slice(tensor, kind, heads)

  def names(self) -> list[str]:
    return list(self._tensors)

  def slice(self, name: str) -> 'Slice':
    """The tensor by name, from which ranges are read when it is indexed."""
    return self._tensors[name]

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensors[name].shape


def files(directory: str) -> list[str]:
  """The names of the GGUF files in a directory, in order."""
  return sorted(name for name in os.listdir(directory) if is_file(name))


def _name(theirs: str, model_type: str) -> str:
  """Hugging Face's name of a tensor; the file's own where there is none."""
  names, layers = _DECODER_NAMES, 'model.layers'
  if model_type == 'bert':
    names, layers = _BERT_NAMES, 'encoder.layer'
  found = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', theirs)
  if found is None or found[2] not in names:
    return theirs
  layer = '' if found[1] is None else f'{layers}.{found[1]}.'
  return f'{layer}{names[found[2]]}.{found[3]}'


class Slice:
  """A tensor on disk: its rows are read, and dequantized, when indexed."""

  def __init__(self, tensor: gguf.ReaderTensor, kind: str, heads: int):
    self.shape = tuple(int(n) for n in reversed(tensor.shape))
    self._tensor, self._kind = tensor, kind
    self._rows = np.arange(self.shape[0])
    if heads:  # (heads, pairs, 2) in the file, (heads, 2, pairs) here
      self._rows = self._rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    self._permuted = bool(heads)

  def get_shape(self) -> tuple[int, ...]:
    return self.shape

  def get_dtype(self) -> str:
    return KINDS[self._kind]

  def __getitem__(self, index) -> np.ndarray:
    rows, *columns = index if isinstance(index, tuple) else (index,)
    if rows is Ellipsis:
      rows = slice(None)
    data = self._tensor.data
    if len(self.shape) == 1 or self._kind in ('F32', 'F16'):
      at = self._rows[rows] if self._permuted else rows
      return np.asarray(data[(at, *columns)])
    # Blocks of numbers lie within a row.
    data = data[self._rows[rows] if self._permuted else rows]
    values = gguf.dequantize(data, self._tensor.tensor_type)
    return values[(slice(None), *columns)]
