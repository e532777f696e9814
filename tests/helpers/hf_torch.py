"""Hugging Face models of toy sizes in torch, and their twins here.

No hub is asked: models are made from random configs and saved to a directory,
from which our side reads them, so that every comparison goes through the
importer.

Dimension key: B batch, T positions, W new tokens.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import toy
import transformers
from jax.sharding import SingleDeviceSharding

from refrag_jax import generate
from refrag_jax.config.schema import DecoderConfig, EncoderConfig
from refrag_jax.hf import convert, families
from refrag_jax.models import losses
from refrag_jax.models.refrag import Refrag, init_params

W = 64
os.environ['HF_HUB_OFFLINE'] = '1'
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# name: (class, config class, what it adds to a random config)
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=300.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=24,
)
DECODERS = {
  'llama': (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
  'llama3': (
    transformers.LlamaForCausalLM,
    transformers.LlamaConfig,
    dict(rope_parameters=LLAMA3),
  ),
  'mistral': (
    transformers.MistralForCausalLM,
    transformers.MistralConfig,
    dict(sliding_window=5),
  ),
  'qwen2': (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {}),
  'qwen3': (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {}),
}
QWEN_WINDOW = dict(
  use_sliding_window=True, sliding_window=5, max_window_layers=0
)
ENCODERS = {
  'roberta': (transformers.RobertaModel, transformers.RobertaConfig, {}),
  'xlm-roberta': (
    transformers.XLMRobertaModel,
    transformers.XLMRobertaConfig,
    dict(type_vocab_size=1),
  ),
  'bert': (transformers.BertModel, transformers.BertConfig, {}),
  'modernbert': (
    transformers.ModernBertModel,
    transformers.ModernBertConfig,
    dict(local_attention=8),
  ),
}


def decoder(name: str, seed: int, **fields):
  """A torch decoder of a family; sizes and settings are drawn."""
  cls, config_cls, added = DECODERS[name]
  rng = np.random.default_rng(seed)
  kv_heads = int(rng.integers(1, 4))
  heads = kv_heads * int(rng.integers(1, 4))
  head_dim = 2 * int(rng.integers(2, 7))
  if name.startswith('qwen') and seed % 2:  # every second one with a window
    fields = QWEN_WINDOW | fields
  values = dict(
    vocab_size=int(rng.integers(40, 80)),
    hidden_size=heads * int(rng.integers(3, 9)),
    intermediate_size=int(rng.integers(13, 50)),
    num_hidden_layers=int(rng.integers(1, 4)),
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    max_position_embeddings=256,
    rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
    tie_word_embeddings=bool(rng.integers(2)),
    rope_parameters=dict(
      rope_type='default', rope_theta=float(rng.choice([50.0, 1e4, 1e6]))
    ),
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
  )
  config = config_cls(**(values | added | fields))
  return _drawn(cls, config, seed)


def encoder(name: str, seed: int, **fields):
  """A torch encoder of a family."""
  cls, config_cls, added = ENCODERS[name]
  rng = np.random.default_rng(seed)
  heads = int(rng.integers(1, 4))
  values = dict(
    vocab_size=int(rng.integers(40, 80)),
    hidden_size=heads * 2 * int(rng.integers(2, 7)),
    intermediate_size=int(rng.integers(13, 50)),
    num_hidden_layers=int(rng.integers(1, 5)),
    num_attention_heads=heads,
    max_position_embeddings=66,
    pad_token_id=0 if name in ('bert', 'modernbert') else 1,
    bos_token_id=None,
    eos_token_id=None,
  )
  if name == 'modernbert':
    values |= dict(norm_eps=float(rng.choice([1e-6, 1e-5])))
  else:
    values |= dict(layer_norm_eps=float(rng.choice([1e-12, 1e-5])))
  config = config_cls(**(values | added | fields))
  return _drawn(cls, config, seed)


def _drawn(cls, config, seed: int):
  """Random weights of which none is 0 or 1 everywhere; eager attention."""
  config._attn_implementation = 'eager'
  torch.manual_seed(seed)
  model = cls(config).eval().float()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.15 * torch.randn_like(parameter))
  return model


def saved(model, directory: pathlib.Path) -> str:
  """The model as `save_pretrained` leaves it."""
  model.save_pretrained(directory)
  return str(directory)


def config_of(directory: str) -> DecoderConfig | EncoderConfig:
  values = families.read_config(directory)
  family = families.FAMILIES[families.family_of(values, directory)]
  if family.group == 'decoder':
    return families.decoder_config(values, directory)
  return families.encoder_config(values, 'cls', directory)


def model_config(cfg: DecoderConfig | EncoderConfig):
  """toy.MODEL with this decoder or encoder in it."""
  if isinstance(cfg, DecoderConfig):
    return toy.dataclasses.replace(toy.MODEL, decoder=cfg)
  policy = toy.dataclasses.replace(
    toy.MODEL.policy, num_heads=1, positions=False
  )
  return toy.dataclasses.replace(toy.MODEL, encoder=cfg, policy=policy)


def abstract(cfg: DecoderConfig | EncoderConfig):
  """The group's parameters, as shapes on one device."""
  model = model_config(cfg)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  group = 'decoder' if isinstance(cfg, DecoderConfig) else 'encoder'
  one = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
    shapes[group],
  )


def read(directory: str):
  """Through the importer: the config and the parameters in a directory."""
  cfg = config_of(directory)
  return cfg, convert.read_params(directory, abstract(cfg))


def gradients(model, directory: pathlib.Path, cfg):
  """A torch model's gradients as our tree: saved like weights, read as they."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.grad is None:  # of rows and heads that nothing reads
        parameter.grad = torch.zeros_like(parameter)
      if 'token_type_embeddings' in name:  # folded into the positions'
        parameter.grad.zero_()
      parameter.copy_(parameter.grad)
  return convert.read_params(saved(model, directory), abstract(cfg))


@functools.cache
def decoder_functions(model: Refrag):
  """Logits, loss with gradients, and W greedy tokens; each jitted."""

  def logits(params, ids_BT):
    ones_BT = jnp.ones_like(ids_BT)
    positions_BT = jnp.broadcast_to(
      jnp.arange(ids_BT.shape[1])[None], ids_BT.shape
    )
    variables = {'params': {'decoder': params}}
    hidden_BTD = model.apply(
      variables, ids_BT, positions_BT, ones_BT, method='lm'
    )
    return hidden_BTD, model.apply(variables, method='head')

  def loss(params, ids_BT):
    hidden_BTD, head_DV = logits(params, ids_BT)
    return losses.token_nll(
      hidden_BTD[:, :-1], head_DV, ids_BT[:, 1:], 0
    ).mean()

  def continued(params, ids_BT):
    B, T = ids_BT.shape
    none = jnp.zeros((B, 0), jnp.int32)
    batch = {
      'prefix_BQ': ids_BT, 'prefix_len_B': jnp.full((B,), T),
      'chunks_BCK': jnp.zeros((B, 0, toy.K), jnp.int32), 'chunk_len_BC': none,
      'output_BO': none, 'output_len_B': jnp.zeros((B,), jnp.int32),
    }  # fmt: skip
    return generate.greedy(
      model, {'decoder': params}, batch, None, none > 0, 0, W, -1
    )

  return (
    jax.jit(lambda params, ids: jnp.matmul(*logits(params, ids))),
    jax.jit(jax.value_and_grad(loss)),
    jax.jit(continued),
  )
