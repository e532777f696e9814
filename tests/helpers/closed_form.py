"""FLOPs of a stage's step from the sizes alone.

A product of (a, b) with (b, c) costs 2abc; nothing else counts. Attention is
dense: every query meets every key, as XLA's masked attention computes it.

In training, a product with a weight is done once forward, once for the gradient
of its input, and, unless the weight is frozen, once for that of the weight. The
two products of attention have no weight and always cost three.

Dimension key (paper): L chunks, M encoder tokens of a chunk, T decoder
positions, o output tokens, G rollouts.
"""

from refrag_jax.config.schema import DecoderConfig, ModelConfig

# How often each kind of product is done: (with a weight, within attention).
FORWARD, FROZEN, TRAINED = (1, 1), (2, 3), (3, 3)


def _stack(num_layers, weights, attention_width, T, times):
  """`weights`: of one layer, each met by every one of T positions."""
  linear = 2 * num_layers * weights * T
  attention = 2 * 2 * num_layers * attention_width * T**2
  return times[0] * linear + times[1] * attention


def decoder(d: DecoderConfig, T: int, o: int, times) -> int:
  """T positions through the layers, o of them through the head."""
  query, key_value = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
  weights = 2 * d.width * (query + key_value) + 3 * d.width * d.mlp_width
  head = 2 * d.width * d.vocab_size * o
  return _stack(d.num_layers, weights, query, T, times) + times[0] * head


def chunks(m: ModelConfig, L: int, M: int, times) -> int:
  """L chunks of M tokens through the encoder, then through the projection."""
  e = m.encoder
  weights = 4 * e.width**2 + 2 * e.width * e.mlp_width
  encoder = L * _stack(e.num_layers, weights, e.width, M, times)
  return encoder + times[0] * project(m, L)


def project(m: ModelConfig, L: int) -> int:
  return 2 * L * (m.encoder.width * m.decoder.width + m.decoder.width**2)


def policy(m: ModelConfig, L: int, times) -> int:
  width = m.encoder.width
  weights = 4 * width**2 + 2 * width * m.policy.mlp_width
  stack = _stack(m.policy.num_layers, weights, width, L, times)
  return stack + times[0] * 2 * L * width


def positions(m: ModelConfig, q: int, L: int, o: int, expanded: int = 0) -> int:
  """Decoder positions; the last output is a target, never an input."""
  return q + (L - expanded) + expanded * m.chunk_size + o - 1


def lm(m: ModelConfig, T: int) -> int:
  return decoder(m.decoder, T, T - 1, TRAINED)


def reconstruct(m: ModelConfig, L: int, M: int) -> int:
  """The decoder regenerates all k L tokens, and is frozen."""
  o = L * m.chunk_size
  return chunks(m, L, M, TRAINED) + decoder(
    m.decoder, positions(m, 1, L, o), o, FROZEN
  )


def continued(
  m: ModelConfig, q: int, L: int, M: int, o: int, expanded=0
) -> int:
  """`cpt`, `mixed` and `sft`: everything is trained."""
  T = positions(m, q, L, o, expanded)
  return chunks(m, L, M, TRAINED) + decoder(m.decoder, T, o, TRAINED)


def control(m: ModelConfig, context: int, o: int) -> int:
  """The plain decoder after BOS and `context` tokens."""
  return decoder(m.decoder, 1 + context + o - 1, o, TRAINED)


def cepe(m: ModelConfig, pieces: int, M: int, o: int, times) -> int:
  """Every block's cross-attention from o positions to all pieces' tokens.

  `times`: of the decoder's own products; encoder and cross-attention train.
  """
  d, e = m.decoder, m.encoder
  states = pieces * M + 1  # and the one for rows without context
  weights = 4 * e.width**2 + 2 * e.width * e.mlp_width
  encoder = pieces * _stack(e.num_layers, weights, e.width, M, TRAINED)
  query, key_value = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
  ends = 2 * d.width * query * o + 2 * e.width * key_value * states
  cross = d.num_layers * (2 * ends + 4 * query * o * states)
  return encoder + 3 * cross + decoder(d, o, o, times)


def grpo(
  m: ModelConfig, L: int, M: int, o: int, expanded: int, G: int, updates
):
  """One encoding, one choice, G forward passes; then the policy learns."""
  T = positions(m, 1, L, o, expanded)
  rollouts = chunks(m, L, M, FORWARD) + G * decoder(m.decoder, T, o, FORWARD)
  choice = policy(m, L, FORWARD)
  return rollouts + choice + updates * policy(m, L, TRAINED)
