"""The families of Hugging Face models that come in and go out, as data.

For each: what its config.json says in our numbers, both ways, and which of its
tensors is which of our parameters. Nothing here reads a weight or needs JAX,
so that config files can use it (configs/common.py).

Dimension key: Y layers, D decoder width, E encoder width, N query heads, M
key/value heads, H head dimension, F MLP width, V vocabulary, P positions.
"""

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from refrag_jax.config.schema import DecoderConfig, EncoderConfig
from refrag_jax.errors import UserError
from refrag_jax.hf import hub


class Tensor(NamedTuple):
  """One of our parameters and the tensor, or tensors, that hold it.

  Kernels are (in..., out...) here and (out, in) there, the axes of heads
  folded; all other arrays are the same, folded. Ours stack the layers.
  """

  ours: str  # its path within its group
  theirs: str  # '{}' stands for the layer
  num_in: int = 0  # of a kernel: how many axes it contracts; 0: no kernel
  part: int = 0  # of several kernels in one tensor: which ...
  parts: int = 1  # ... of how many
  first: int = 0  # the first layer that has it; before, ours is all ones
  added: str = ''  # a tensor whose row 0 is added to every row of ours


# Llama, Mistral, Qwen2 and Qwen3; what a model lacks is not in its parameters.
DECODER = (
  Tensor('embed_tokens', 'embed_tokens.weight'),
  Tensor('norm/scale', 'norm.weight'),
  Tensor('lm_head', 'lm_head.weight', 1),
  Tensor('layers/input_layernorm/scale', 'layers.{}.input_layernorm.weight'),
  Tensor(
    'layers/post_attention_layernorm/scale',
    'layers.{}.post_attention_layernorm.weight',
  ),
  *(
    Tensor(f'layers/{x}_proj/{kind}', f'layers.{{}}.self_attn.{x}_proj.{name}',
           num_in)
    for x in 'qkv'
    for kind, name, num_in in (('kernel', 'weight', 1), ('bias', 'bias', 0))
  ),
  Tensor('layers/q_norm/scale', 'layers.{}.self_attn.q_norm.weight'),
  Tensor('layers/k_norm/scale', 'layers.{}.self_attn.k_norm.weight'),
  Tensor('layers/o_proj/kernel', 'layers.{}.self_attn.o_proj.weight', 2),
  *(
    Tensor(f'layers/{x}_proj/kernel', f'layers.{{}}.mlp.{x}_proj.weight', 1)
    for x in ('gate', 'up', 'down')
  ),
)  # fmt: skip


def _dense(ours: str, theirs: str, num_in: int = 1) -> tuple[Tensor, ...]:
  layer = f'encoder.layer.{{}}.{theirs}'
  return (
    Tensor(f'layers/{ours}/kernel', f'{layer}.weight', num_in),
    Tensor(f'layers/{ours}/bias', f'{layer}.bias'),
  )


def _norm(ours: str, theirs: str) -> tuple[Tensor, ...]:
  return (
    Tensor(f'{ours}/scale', f'{theirs}.weight'),
    Tensor(f'{ours}/bias', f'{theirs}.bias'),
  )


# BERT, RoBERTa, XLM-R and what is trained from them (MiniLM, BGE, E5). All
# tokens are of type 0: its embedding is folded into the positions'.
BERT = (
  Tensor('word_embeddings', 'embeddings.word_embeddings.weight'),
  Tensor(
    'position_embeddings',
    'embeddings.position_embeddings.weight',
    added='embeddings.token_type_embeddings.weight',
  ),
  *_norm('embeddings_norm', 'embeddings.LayerNorm'),
  *_dense('q_proj', 'attention.self.query'),
  *_dense('k_proj', 'attention.self.key'),
  *_dense('v_proj', 'attention.self.value'),
  *_dense('o_proj', 'attention.output.dense', 2),
  *_norm(
    'layers/attention_norm', 'encoder.layer.{}.attention.output.LayerNorm'
  ),
  *_dense('up_proj', 'intermediate.dense'),
  *_dense('down_proj', 'output.dense'),
  *_norm('layers/output_norm', 'encoder.layer.{}.output.LayerNorm'),
)
MODERNBERT = (
  Tensor('word_embeddings', 'embeddings.tok_embeddings.weight'),
  Tensor('embeddings_norm/scale', 'embeddings.norm.weight'),
  Tensor('layers/attention_norm/scale', 'layers.{}.attn_norm.weight', first=1),
  *(
    Tensor(f'layers/{x}_proj/kernel', 'layers.{}.attn.Wqkv.weight', 1, i, 3)
    for i, x in enumerate('qkv')
  ),
  Tensor('layers/o_proj/kernel', 'layers.{}.attn.Wo.weight', 2),
  Tensor('layers/mlp_norm/scale', 'layers.{}.mlp_norm.weight'),
  Tensor('layers/gate_proj/kernel', 'layers.{}.mlp.Wi.weight', 1, 0, 2),
  Tensor('layers/up_proj/kernel', 'layers.{}.mlp.Wi.weight', 1, 1, 2),
  Tensor('layers/down_proj/kernel', 'layers.{}.mlp.Wo.weight', 1),
  Tensor('final_norm/scale', 'final_norm.weight'),
)


class Family(NamedTuple):
  group: str  # 'decoder' or 'encoder'
  architecture: str  # the class that loads what we write
  tensors: tuple[Tensor, ...]
  prefix: str  # of its tensors' names in a model with a head
  tied: tuple[str, str]  # the embedding, and the head that is it where tied
  heads: str = '$^'  # regex: tensors of heads, which REFRAG has no use for


BUFFERS = r'rotary_emb\.inv_freq$|^embeddings\.position_ids$'  # no weights
_LM_HEAD = ('embed_tokens.weight', 'lm_head.weight')
_BERT_WORDS = 'embeddings.word_embeddings.weight'
_BERT_HEADS = r'^(pooler|cls|lm_head|classifier)\.'
FAMILIES = {
  'llama': Family('decoder', 'LlamaForCausalLM', DECODER, 'model.', _LM_HEAD),
  'mistral': Family(
    'decoder', 'MistralForCausalLM', DECODER, 'model.', _LM_HEAD
  ),
  'qwen2': Family('decoder', 'Qwen2ForCausalLM', DECODER, 'model.', _LM_HEAD),
  'qwen3': Family('decoder', 'Qwen3ForCausalLM', DECODER, 'model.', _LM_HEAD),
  'bert': Family(
    'encoder', 'BertModel', BERT, 'bert.',
    (_BERT_WORDS, 'cls.predictions.decoder.weight'), _BERT_HEADS,
  ),
  'roberta': Family(
    'encoder', 'RobertaModel', BERT, 'roberta.',
    (_BERT_WORDS, 'lm_head.decoder.weight'), _BERT_HEADS,
  ),
  'xlm-roberta': Family(
    'encoder', 'XLMRobertaModel', BERT, 'roberta.',
    (_BERT_WORDS, 'lm_head.decoder.weight'), _BERT_HEADS,
  ),
  'modernbert': Family(
    'encoder', 'ModernBertModel', MODERNBERT, 'model.',
    ('embeddings.tok_embeddings.weight', 'decoder.weight'),
    r'^(head|decoder|classifier)\.',
  ),
}  # fmt: skip
ADAPTERS = (
  'adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin',
)  # fmt: skip


def adapter_in(directory: str) -> str:
  """The file that tells of a LoRA adapter in this directory; '' if none."""
  there = (name for name in ADAPTERS if _exists(directory, name))
  return next(there, '')


def refuse_adapter(directory: str, found: str) -> None:
  """Refuses weights that are changes to those of another model."""
  raise UserError(
    f'{directory} holds a LoRA adapter: merge it first (merge_and_unload), and '
    f'name the directory of the merged model; the adapter is in {found}'
  )


def read_config(directory: str) -> dict[str, Any]:
  """config.json of a model's directory.

  Raises:
    UserError: there is none, it is damaged, or it is not of all that is there.
  """
  if found := adapter_in(directory):
    refuse_adapter(directory, found)
  path = os.path.join(directory, 'config.json')
  if not os.path.exists(path):
    below = [m['path'] for m in modules(directory) if m['kind'] == TRANSFORMER]
    if below and _exists(directory, below[0], 'config.json'):
      raise UserError(
        f'{directory} has its model in {below[0]}: name '
        f'{os.path.join(directory, below[0])}'
      )
    raise UserError(
      f'{directory} has no config.json: name the directory of a Hugging Face '
      'model, or that of a stage under checkpoints/'
    )
  values = hub.read_json(path)
  if not isinstance(values, dict):
    raise UserError(f'{path} is no JSON object')
  return values


def _exists(*path: str) -> bool:
  return os.path.exists(os.path.join(*path))


TRANSFORMER, POOLING = 'Transformer', 'Pooling'


def modules(directory: str) -> list[dict[str, str]]:
  """What a sentence encoder is made of, in order; [] of any other model.

  Returns:
    For each module its `kind`, such as 'Dense', its `type`, which is that with
    the Python module around it, and its `path`, from this directory.

  Raises:
    UserError: the list of modules is none.
  """
  path = os.path.join(directory, 'modules.json')
  if not os.path.exists(path):
    # Named by its subdirectory, it is still the first of those modules.
    directory = os.path.abspath(directory)
    above, name = os.path.split(directory)
    if not _exists(above, 'modules.json'):
      return []
    beside = modules(above)
    if not any(m['kind'] == TRANSFORMER and m['path'] == name for m in beside):
      return []
    moved = lambda m: '' if m['path'] == name else os.path.join('..', m['path'])
    return [m | {'path': moved(m)} for m in beside]
  try:
    return [
      {
        'kind': module['type'].rpartition('.')[2],
        'type': module['type'],
        'path': module['path'],
      }
      for module in hub.read_json(path)
    ]
  except (TypeError, KeyError, AttributeError):
    raise UserError(
      f'{path} is no list of modules with type and path: download it again'
    ) from None


def left_out(found: list[dict[str, str]]) -> list[dict[str, str]]:
  """Those of `modules` that REFRAG does not run."""
  return [m for m in found if m['kind'] not in (TRANSFORMER, POOLING)]


def pooling(directory: str) -> str:
  """How an encoder's vector is made of its states: 'cls' or 'mean'.

  Sentence encoders say it in 1_Pooling/config.json; others leave it open, and
  then it is the first position.

  Raises:
    UserError: it is another one.
  """
  paths = [m['path'] for m in modules(directory) if m['kind'] == POOLING]
  path = os.path.join(directory, *(paths or ['1_Pooling'])[:1], 'config.json')
  if not os.path.exists(path):
    return 'cls'
  values = hub.read_json(path)
  # One name, or a switch for each kind; several are joined end to end.
  found = [
    key for key, on in values.items() if key.startswith('pooling_mode_') and on
  ]
  found += [values['pooling_mode']] if values.get('pooling_mode') else []
  kinds = {
    'cls': 'cls', 'pooling_mode_cls_token': 'cls',
    'mean': 'mean', 'pooling_mode_mean_tokens': 'mean',
  }  # fmt: skip
  if len(found) != 1 or found[0] not in kinds:
    raise UserError(
      f'{path}: only pooling by cls or by mean is supported, not '
      f'{" and ".join(map(str, found)) or "none"}'
    )
  return kinds[found[0]]


def family_of(values: Mapping[str, Any], where: str) -> str:
  """The model_type of a config.json.

  Raises:
    UserError: it is none of FAMILIES, or quantized.
  """
  name, quantized = values.get('model_type'), values.get('quantization_config')
  if quantized:
    raise UserError(
      f'{where} is quantized ({quantized.get("quant_method", "?")}), which is '
      'not supported: take the model before it was'
    )
  if name not in FAMILIES:
    raise UserError(
      f'{where} is a model of type {name!r}, which is not supported; there '
      f'are {", ".join(FAMILIES)}'
    )
  return name


def canonical(name: str, prefix: str, family: Family) -> str:
  """A tensor's name as in Tensor.theirs, whatever it was wrapped in.

  Args:
    prefix: what stands before the names of the model proper. Its head has what
      is left of it without the family's own.
  """
  outer = prefix
  if f'.{prefix}'.endswith(f'.{family.prefix}'):
    outer = prefix.removesuffix(family.prefix)
  for found in (prefix, outer):
    if name.startswith(found):
      return _modern(name.removeprefix(found))
  return _modern(name)


def _modern(name: str) -> str:
  """Without TensorFlow's names, in the files of the first BERTs."""
  name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
  return re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)


def prefix_of(
  names: Iterable[str], needed: Collection[str], family: Family, where: str
) -> str:
  """What stands before the names of the tensors that a model needs.

  Nothing, the family's own prefix, or what some program wrapped it in.

  Raises:
    UserError: the files hold two such models.
  """
  found = Counter()
  for name in names:
    parts = name.split('.')
    for i in range(len(parts)):
      if _modern('.'.join(parts[i:])) in needed:
        found['.'.join([*parts[:i], ''])] += 1
        break
  ((first, count), (second, other)) = [
    *found.most_common(2), (family.prefix, 0), ('', 0),
  ][:2]  # fmt: skip
  if 2 * other > count:
    raise UserError(
      f'{where} holds two models, whose tensors begin with {first!r} and '
      f'{second!r}: save the one that is meant by itself'
    )
  return first


# --- config.json to our numbers -----------------------------------------------


def numbers(name: str, group: str) -> dict[str, Any]:
  """The fields of a DecoderConfig or EncoderConfig, by config.json.

  Args:
    name: a directory or a hub name.
    group: 'decoder' or 'encoder', which it must be.
  """
  directory = hub.resolve(name, weights=False)
  values = read_config(directory)
  if group == 'decoder':
    return dataclasses.asdict(decoder_config(values, directory))
  kind = pooling(directory)
  return dataclasses.asdict(encoder_config(values, kind, directory))


def _one_line(read: Callable) -> Callable:
  """Values of the wrong kind are one sentence, whatever they trip up."""

  @functools.wraps(read)
  def guarded(values, *args):
    try:
      return read(values, *args)
    except (
      ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
    ) as e:  # fmt: skip
      raise UserError(
        f'{args[-1]}: config.json cannot be right ({e!r})'
      ) from None

  return guarded


class _Reader:
  """Values of a config.json, with errors that name file and key."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self.values, self.where = values, where

  def __call__(self, key: str, default: Any = None) -> Any:
    value = self.values.get(key)
    if value is None:
      value = default
    if value is None:
      raise UserError(f'{self.where} has no {key}, which this model needs')
    return value

  def require(self, key: str, *allowed: Any) -> None:
    """Refuses a variant that these models do not have."""
    value = self.values.get(key, allowed[0])
    if value not in allowed:
      raise UserError(
        f'{self.where}: {key} {value!r} is not supported, only '
        f'{", ".join(map(repr, allowed))}'
      )


@_one_line
def decoder_config(values: Mapping[str, Any], where: str) -> DecoderConfig:
  """The numbers of a decoder, from the layouts of transformers 5 and before.

  Raises:
    UserError: a number is missing, or the model has something that ours has
      not.
  """
  family, read = family_of(values, where), _Reader(values, where)
  if FAMILIES[family].group != 'decoder':
    raise UserError(f'{where} is of type {family}, which is an encoder')
  read.require('hidden_act', 'silu')
  read.require('mlp_bias', False)
  if family != 'qwen2':  # which has biases whatever it says
    read.require('attention_bias', False)
  heads, width = read('num_attention_heads'), read('hidden_size')
  default_head_dim = 128 if family == 'qwen3' else width // heads
  theta, scaling = _rope(values, read)
  return DecoderConfig(
    vocab_size=read('vocab_size'),
    num_layers=read('num_hidden_layers'),
    width=width,
    mlp_width=read('intermediate_size'),
    num_heads=heads,
    num_kv_heads=read('num_key_value_heads', heads),
    head_dim=read('head_dim', default_head_dim),
    rope_theta=theta,
    **scaling,
    norm_eps=read('rms_norm_eps', 1e-6),
    tie_embeddings=bool(values.get('tie_word_embeddings', False)),
    qkv_bias=family == 'qwen2',
    qk_norm=family == 'qwen3',
    sliding_window=_sliding_window(family, values, where),
    max_length=read('max_position_embeddings'),
  )


def _rope(values, read) -> tuple[float, dict[str, Any]]:
  """Base and scaling; transformers 5 has them in rope_parameters."""
  # Where both are there, transformers reads the older one.
  scaling = values.get('rope_scaling') or values.get('rope_parameters') or {}
  theta = scaling.get('rope_theta') or values.get('rope_theta') or 10_000.0
  kind = scaling.get('rope_type') or scaling.get('type') or 'default'
  off = dict(
    rope_factor=1.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_length=0,
  )
  if kind == 'default':
    return float(theta), off
  if kind != 'llama3':
    raise UserError(
      f'{read.where}: rotary positions scaled by {kind!r} are not supported, '
      "only 'llama3'"
    )
  scaled = _Reader(scaling, f'{read.where}, rope scaling,')
  return float(theta), dict(
    rope_factor=float(scaled('factor')),
    rope_low_freq_factor=float(scaled('low_freq_factor')),
    rope_high_freq_factor=float(scaled('high_freq_factor')),
    rope_original_length=int(scaled('original_max_position_embeddings')),
  )


def _sliding_window(family: str, values, where: str) -> int:
  """Positions seen, itself included; 0 where all are."""
  if family == 'mistral':  # absent means 4096, null means none
    return values.get('sliding_window', 4096) or 0
  if not values.get('use_sliding_window') or family == 'llama':
    return 0
  layers = values['num_hidden_layers']
  first = values.get('max_window_layers', 28)  # as in transformers
  kinds = values.get('layer_types') or [
    'sliding_attention' if y >= first else 'full_attention'
    for y in range(layers)
  ]
  if len(set(kinds)) > 1:
    raise UserError(
      f'{where}: some layers have a sliding window and others have none, '
      'which is not supported'
    )
  if kinds[0] == 'full_attention':
    return 0
  return values.get('sliding_window', 4096) or 0


@_one_line
def encoder_config(
  values: Mapping[str, Any], pooling: str, where: str
) -> EncoderConfig:
  """The numbers of an encoder; errors as in `decoder_config`.

  Args:
    pooling: 'cls' or 'mean', which config.json does not say.
  """
  family, read = family_of(values, where), _Reader(values, where)
  if FAMILIES[family].group != 'encoder':
    raise UserError(f'{where} is of type {family}, which is a decoder')
  numbers = dict(
    vocab_size=read('vocab_size'),
    num_layers=read('num_hidden_layers'),
    width=read('hidden_size'),
    mlp_width=read('intermediate_size'),
    num_heads=read('num_attention_heads'),
    pooling=pooling,
  )
  if family == 'modernbert':
    return _modernbert_config(read, numbers)
  read.require('hidden_act', 'gelu')
  read.require('position_embedding_type', 'absolute')
  read.require('is_decoder', False)
  read.require('add_cross_attention', False)
  offset = 0 if family == 'bert' else read('pad_token_id', 1) + 1
  return EncoderConfig(
    kind='bert',
    **numbers,
    max_length=read('max_position_embeddings') - offset,
    position_offset=offset,
    global_every=0,
    local_window=0,
    rope_theta=0.0,
    local_rope_theta=0.0,
    norm_eps=read('layer_norm_eps', 1e-12),
  )


def _modernbert_config(read: _Reader, numbers) -> EncoderConfig:
  read.require('hidden_activation', 'gelu')
  for key in ('norm_bias', 'attention_bias', 'mlp_bias'):
    read.require(key, False)
  every = read('global_attn_every_n_layers', 3)
  kinds = read.values.get('layer_types')
  if kinds:
    if len(kinds) != numbers['num_layers']:
      raise UserError(
        f'{read.where}: layer_types has {len(kinds)} entries for '
        f'{numbers["num_layers"]} layers'
      )
    whole = [i for i, kind in enumerate(kinds) if kind == 'full_attention']
    every = whole[1] - whole[0] if len(whole) > 1 else len(kinds)
    if whole != list(range(0, len(kinds), every)):
      raise UserError(
        f'{read.where}: layer_types is not every n-th layer from the first on '
        'with full attention'
      )
  ropes = read.values.get('rope_parameters') or {}
  for scaling in (read.values.get('rope_scaling'), *ropes.values()):
    kind = (scaling or {}).get('rope_type', 'default')
    if kind != 'default':
      raise UserError(
        f'{read.where}: rotary positions scaled by {kind!r} are not supported'
      )
  theta = lambda kind, old, default: float(
    (ropes.get(kind) or {}).get('rope_theta') or read(old, default)
  )
  return EncoderConfig(
    kind='modernbert',
    **numbers,
    max_length=read('max_position_embeddings'),
    position_offset=0,
    global_every=every,
    local_window=read('local_attention', 128) // 2,
    rope_theta=theta('full_attention', 'global_rope_theta', 160_000.0),
    local_rope_theta=theta('sliding_attention', 'local_rope_theta', 10_000.0),
    norm_eps=read('norm_eps', 1e-5),
  )


# --- Our numbers to config.json -----------------------------------------------

# Of the files that a model came in, and not of what is written.
_OF_FILES = ('auto_map', 'torch_dtype', 'transformers_version', '_name_or_path')


def config_json(
  group: str, cfg: DecoderConfig | EncoderConfig, came: Mapping[str, Any]
) -> dict[str, Any]:
  """config.json of a decoder or encoder: the one it came with, if it fits.

  Args:
    came: the config.json of the model that it was trained from; {} if none.
  """
  if came:
    if group == 'decoder':
      theirs = decoder_config(came, 'config.json')
      theirs = dataclasses.replace(
        theirs, max_length=cfg.max_length and theirs.max_length
      )
    else:
      theirs = encoder_config(came, cfg.pooling, 'config.json')
    if not differences(cfg, theirs):
      architecture = FAMILIES[came['model_type']].architecture
      kept = {k: v for k, v in came.items() if k not in _OF_FILES}
      return shortest(kept | {'architectures': [architecture]})
  return shortest(
    decoder_json(cfg) if group == 'decoder' else encoder_json(cfg)
  )


def shortest(value: Any) -> Any:
  """Floats that went through float32 as the decimals they were before.

  9.999999747378752e-06 is what float32 has nearest to 1e-05.
  """
  if isinstance(value, Mapping):
    return {key: shortest(inner) for key, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [shortest(inner) for inner in value]
  if isinstance(value, float) and value == float(np.float32(value)):
    return float(str(np.float32(value)))
  return value


def decoder_json(cfg: DecoderConfig) -> dict[str, Any]:
  """config.json of the family that has what this decoder has.

  In the layout of transformers 5, and with the keys of the older one where
  they do not contradict it.

  Raises:
    UserError: no family has all of it.
  """
  found = [
    name
    for name, has in {'qwen3': cfg.qk_norm, 'qwen2': cfg.qkv_bias}.items()
    if has
  ] or ['mistral' if cfg.sliding_window else 'llama']
  if len(found) > 1:
    raise UserError(
      'no Hugging Face family has all that this decoder has: it would have to '
      f'be {" and ".join(found)} at once'
    )
  rope, older = {'rope_type': 'default', 'rope_theta': cfg.rope_theta}, {}
  if cfg.rope_factor != 1:
    rope |= {
      'rope_type': 'llama3',
      'factor': cfg.rope_factor,
      'low_freq_factor': cfg.rope_low_freq_factor,
      'high_freq_factor': cfg.rope_high_freq_factor,
      'original_max_position_embeddings': cfg.rope_original_length,
    }
    older = {'rope_scaling': rope}
  if found[0] != 'mistral' and cfg.sliding_window:  # Qwen's switches for it
    older |= {'use_sliding_window': True, 'max_window_layers': 0}
  return older | {
    'architectures': [FAMILIES[found[0]].architecture],
    'model_type': found[0],
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.width,
    'intermediate_size': cfg.mlp_width,
    'num_hidden_layers': cfg.num_layers,
    'num_attention_heads': cfg.num_heads,
    'num_key_value_heads': cfg.num_kv_heads,
    'head_dim': cfg.head_dim,
    'hidden_act': 'silu',
    'rms_norm_eps': cfg.norm_eps,
    'tie_word_embeddings': cfg.tie_embeddings,
    # Trained from nothing here, a model has rotary positions without end.
    'max_position_embeddings': cfg.max_length or 1 << 20,
    'sliding_window': cfg.sliding_window or None,
    'rope_theta': cfg.rope_theta,
    'rope_parameters': rope,
  }


def encoder_json(cfg: EncoderConfig) -> dict[str, Any]:
  """config.json of an encoder."""
  shared = {
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.width,
    'intermediate_size': cfg.mlp_width,
    'num_hidden_layers': cfg.num_layers,
    'num_attention_heads': cfg.num_heads,
    'max_position_embeddings': cfg.max_length + cfg.position_offset,
  }
  if cfg.kind == 'modernbert':
    return shared | {
      'architectures': ['ModernBertModel'],
      'model_type': 'modernbert',
      'hidden_activation': 'gelu',
      'global_attn_every_n_layers': cfg.global_every,
      'local_attention': 2 * cfg.local_window,
      'global_rope_theta': cfg.rope_theta,
      'local_rope_theta': cfg.local_rope_theta,
      'norm_eps': cfg.norm_eps,
      'pad_token_id': 0,
    }
  family = 'roberta' if cfg.position_offset else 'bert'
  return shared | {
    'architectures': [FAMILIES[family].architecture],
    'model_type': family,
    'hidden_act': 'gelu',
    'layer_norm_eps': cfg.norm_eps,
    'type_vocab_size': 1 if cfg.position_offset else 2,
    # RoBERTa's first position stands behind that of padding.
    'pad_token_id': max(cfg.position_offset - 1, 0),
  }


def differences(ours: Any, theirs: Any) -> list[str]:
  """The numbers in which two configs of a model disagree, by name."""
  return [
    f'{f.name} is {getattr(ours, f.name)!r} in the config and '
    f'{getattr(theirs, f.name)!r} in the files'
    for f in dataclasses.fields(ours)
    if shortest(getattr(ours, f.name)) != shortest(getattr(theirs, f.name))
  ]
