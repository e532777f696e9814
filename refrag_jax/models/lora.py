"""LoRA: low-rank changes to the decoder's projections (Hu et al. 2021).

    y = x W + (alpha / rank) (x A) B

W stays as it was; A is random and B zero at first, so that an untrained adapter
changes nothing. They are a group of parameters by themselves, which a stage
trains and a checkpoint keeps as it does every group. In a training step (see
`Dropping`) each adapter's x has some of its numbers set to 0.

Dimension key: R rank; the rest as in models/decoder.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import DecoderConfig, LoraConfig
from refrag_jax.models import layers


def shapes(c: DecoderConfig) -> dict[str, tuple[tuple[int, ...], int]]:
  """For each target its kernel's shape, and how many axes it contracts."""
  D, N, M, H = c.width, c.num_heads, c.num_kv_heads, c.head_dim
  return {
    'q_proj': ((D, N, H), 1),
    'k_proj': ((D, M, H), 1),
    'v_proj': ((D, M, H), 1),
    'o_proj': ((N, H, D), 2),
    'gate_proj': ((D, c.mlp_width), 1),
    'up_proj': ((D, c.mlp_width), 1),
    'down_proj': ((c.mlp_width, D), 1),
  }


class Adapter(nn.Module):
  """(alpha / rank) (x A) B of one projection, in the dtype of x."""

  shape: tuple[int, ...]  # of the kernel that it is added to
  num_in: int
  cfg: LoraConfig

  @nn.compact
  def __call__(self, x):
    R, n = self.cfg.rank, self.num_in
    if self.cfg.dropout and self.has_rng('dropout'):
      x = nn.Dropout(self.cfg.dropout, deterministic=False)(x)
    h_BTR = layers.Projection((*self.shape[:n], R), n, False, name='a')(x)
    y = layers.Projection(
      (R, *self.shape[n:]), 1, False, nn.initializers.zeros, name='b'
    )(h_BTR)
    return y * (self.cfg.alpha / R)


class Adapters(nn.Module):
  """The adapters of a block, stacked over the layers like what they change."""

  decoder: DecoderConfig
  cfg: LoraConfig

  def setup(self):
    of = shapes(self.decoder)
    for name in self.cfg.targets:
      setattr(self, name, Adapter(*of[name], self.cfg))

  def __call__(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """y, the projection `name` of x, with its change."""
    return y + getattr(self, name)(x) if name in self.cfg.targets else y


class Dropping:
  """A model whose adapters drop some of what they read, drawn with `key`.

  It is applied as the model itself is.
  """

  def __init__(self, model: nn.Module, key: jax.Array):
    self.model, self.key, self.cfg = model, key, model.cfg

  def apply(self, variables: dict, *args, **kwargs):
    rngs = {'dropout': self.key}
    return self.model.apply(variables, *args, rngs=rngs, **kwargs)


def merge(params: dict, cfg: LoraConfig) -> dict:
  """The parameters without the group `lora`: its changes are in the decoder's.

  In float32, whatever the compute dtype.
  """
  layers_of = dict(params['decoder']['layers'])
  for name, adapter in params['lora'].items():
    a_YR, b_YR = adapter['a']['kernel'], adapter['b']['kernel']
    change = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a_YR, b_YR)
    kernel = layers_of[name]['kernel']
    changed = kernel + change.reshape(kernel.shape) * (cfg.alpha / cfg.rank)
    layers_of[name] = layers_of[name] | {'kernel': changed}
  rest = {group: x for group, x in params.items() if group != 'lora'}
  return rest | {'decoder': params['decoder'] | {'layers': layers_of}}
