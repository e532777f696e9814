"""FLOPs of a forward pass in closed form, for models that are not there.

A product of (a, b) and (b, c) costs 2abc, and attention is dense, every query
meeting every key, as XLA's masked attention computes it. Sizes are a config's,
as config.json has them: `decoder`, `encoder`, `policy` of config.model.
"""

from collections.abc import Mapping


def decoder_flops(decoder: Mapping[str, int], positions: int) -> int:
  """Through all layers, without the output matrix."""
  query = decoder['num_heads'] * decoder['head_dim']
  key_value = decoder['num_kv_heads'] * decoder['head_dim']
  width = decoder['width']
  weights = 2 * width * (query + key_value) + 3 * width * decoder['mlp_width']
  return _stack(decoder['num_layers'], weights, query, positions)


def encoder_flops(
  encoder: Mapping[str, int], sequences: int, length: int
) -> int:
  """`sequences` of `length` encoder tokens, special tokens included."""
  width = encoder['width']
  weights = 4 * width**2 + 2 * width * encoder['mlp_width']
  return sequences * _stack(encoder['num_layers'], weights, width, length)


def projection_flops(
  encoder: Mapping[str, int], decoder: Mapping[str, int], chunks: int
) -> int:
  """The projection of every chunk vector (paper B.2: hidden = output width)."""
  return 2 * chunks * decoder['width'] * (encoder['width'] + decoder['width'])


def policy_flops(
  policy: Mapping[str, int], encoder: Mapping[str, int], chunks: int
) -> int:
  """One score for every chunk, at the encoder's width."""
  width = encoder['width']
  weights = 4 * width**2 + 2 * width * policy['mlp_width']
  stack = _stack(policy['num_layers'], weights, width, chunks)
  return stack + 2 * chunks * width


def cross_attention_flops(
  encoder: Mapping[str, int],
  decoder: Mapping[str, int],
  positions: int,
  states: int,
) -> int:
  """CEPE's reading of `states` encoder tokens from `positions`, all layers."""
  query = decoder['num_heads'] * decoder['head_dim']
  key_value = decoder['num_kv_heads'] * decoder['head_dim']
  weights = 2 * positions * decoder['width'] * query
  weights += 2 * states * encoder['width'] * key_value
  attention = 2 * positions * states * query
  return decoder['num_layers'] * 2 * (weights + attention)


def _stack(layers: int, weights: int, attention: int, length: int) -> int:
  """`weights` of a layer meet each position; two products in attention."""
  return layers * (2 * weights * length + 4 * attention * length**2)
