"""Closed forms: the paper's model of latency (Tables 6 and 9), and FLOPs.

The paper's symbols: s context tokens, o output tokens, k chunk size, b batch,
d width, l layers, n parameters, f FLOP/s, m bytes/s. Its assumptions: bf16,
chunk embeddings cached, prefill bound by compute, generation by memory, the
question neglected. k = 1 is the plain decoder.

The FLOPs below are ours, of any sizes: a product of (a, b) and (b, c) costs
2abc, and attention is dense, every query meeting every key, as XLA's masked
attention computes it.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Decoder(NamedTuple):
  """What the paper's model knows of a decoder."""

  layers: int
  width: int
  params: int


LLAMA2_7B = Decoder(layers=32, width=4096, params=6_738_415_616)


def kv_cache_bytes(m: Decoder, s: int, o: int, k: int = 1, b: int = 1) -> float:
  """4 d l b (s / k + o): keys and values in bf16 (Table 9)."""
  return 4 * m.width * m.layers * b * (s / k + o)


def ttft_seconds(
  m: Decoder, s: int, k: int = 1, b: int = 1, flops_per_s: float = 1.0
) -> float:
  """Time to the first token, (24 d^2 + 4 d s/k) l b (s/k) / f (Table 9)."""
  positions = s / k
  per_position = 24 * m.width**2 + 4 * m.width * positions
  return per_position * m.layers * b * positions / flops_per_s


def ttit_seconds(
  m: Decoder,
  s: int,
  o: int,
  k: int = 1,
  b: int = 1,
  bytes_per_s: float = 1.0,
) -> float:
  """Time of a later token, (2n + 4 d l b (s/k + o)) / m (Table 9).

  All parameters and the whole cache are read once for it.
  """
  return (2 * m.params + kv_cache_bytes(m, s, o, k, b)) / bytes_per_s


def tokens_per_second(
  m: Decoder,
  s: int,
  o: int,
  k: int = 1,
  b: int = 1,
  flops_per_s: float = 1.0,
  bytes_per_s: float = 1.0,
) -> float:
  """Throughput, b o / (TTFT + o TTIT).

  The paper's Table 9 prints TTFT + TTIT; its text says b o / (TTFT + DL), and
  the data latency DL of o tokens is o TTIT.
  """
  first = ttft_seconds(m, s, k, b, flops_per_s)
  later = ttit_seconds(m, s, o, k, b, bytes_per_s)
  return b * o / (first + o * later)


def ttft_ratio(m: Decoder, s: int, k: int) -> float:
  """How much sooner the first token comes: k^2 (6ds + s^2) / (6dsk + s^2).

  k for short s, k^2 only for s far above 6dk (Table 6).
  """
  return ttft_seconds(m, s) / ttft_seconds(m, s, k)


def ttit_ratio(m: Decoder, s: int, o: int, k: int, b: int = 1) -> float:
  """How much sooner a later token comes (Table 6): 1 for short s, k for long.

  (2dlbsk + nk + 2dlbok) / (2dlbs + nk + 2dlbok).
  """
  return ttit_seconds(m, s, o, b=b) / ttit_seconds(m, s, o, k, b)


def kv_cache_ratio(s: int, o: int, k: int) -> float:
  """How much smaller the cache is, (ks + ko) / (s + ko) (Table 6)."""
  return (k * s + k * o) / (s + k * o)


# --- FLOPs of a forward pass --------------------------------------------------
# Sizes are a config's, as config.json has them: `decoder`, `encoder`, `policy`
# of config.model.


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
