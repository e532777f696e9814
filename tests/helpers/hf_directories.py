"""Toy models of each family, written as Hugging Face directories."""

import os

import jax
import numpy as np
import toy

from refrag_jax import sharding
from refrag_jax.hf import convert, families
from refrag_jax.models.refrag import init_params

QWEN2 = dict(qkv_bias=True)
QWEN3 = dict(qk_norm=True)
MISTRAL = dict(sliding_window=4)
LLAMA3 = dict(
  rope_factor=8.0, rope_original_length=16, rope_low_freq_factor=1.0,
  rope_high_freq_factor=4.0,
)  # fmt: skip
MODERN = dict(
  kind='modernbert', position_offset=0, global_every=2, local_window=3,
  rope_theta=60.0, local_rope_theta=20.0,
)  # fmt: skip
GROUPS = {
  'llama': ('decoder', {}),
  'wide': ('decoder', dict(width=32, mlp_width=64)),  # whole blocks of 32
  'tied': ('decoder', dict(tie_embeddings=True)),
  'llama3': ('decoder', LLAMA3),
  'mistral': ('decoder', MISTRAL),
  'qwen2': ('decoder', QWEN2),
  'qwen3': ('decoder', QWEN3),
  'qwen3_window': ('decoder', QWEN3 | MISTRAL),
  'roberta': ('encoder', {}),
  'bert': ('encoder', dict(position_offset=0)),
  'modernbert': ('encoder', MODERN),
}


def config_of(name):
  """A toy model whose decoder or encoder is of a family."""
  group, fields = GROUPS[name]
  limits = {'max_length': 64} if group == 'decoder' else {}
  return group, toy.replace(group, **limits, **fields)


def write(name, directory, dtype=np.float32):
  """Random weights of a family; returns (group, config, params)."""
  group, config = config_of(name)
  cfg = getattr(config, group)
  to_json = {'decoder': families.decoder_json,
             'encoder': families.encoder_json}  # fmt: skip
  params = toy.params(config)[group]
  os.makedirs(directory)
  values = to_json[group](cfg)
  convert.write_params(str(directory), group, params, values, dtype)
  return group, cfg, params


def abstract(name, mesh):
  group, config = config_of(name)
  return tree_of(config, mesh, group)


def tree_of(config, mesh, group='decoder'):
  """A group's shapes with their shardings."""
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.infer_shardings(shapes, mesh),
  )[group]


def of_directory(directory):
  directory = str(directory)
  values = families.read_config(directory)
  family = families.family_of(values, directory)
  if families.FAMILIES[family].group == 'decoder':
    return families.decoder_config(values, directory)
  return families.encoder_config(values, 'cls', directory)
