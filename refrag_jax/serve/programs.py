"""What the engine runs on the devices: encode, splice, prefill, decode.

Dimension key: B rows (slots of a pool), C chunks, K chunk size, T positions of
a prefill, S positions of a slot, M encoder tokens; and, in caches, M key/value
heads, H head dimension; D decoder width, E encoder width, V vocabulary.

Each is a jitted function of arrays; what is static (the model's numbers, the
length of what is read) is named in its signature, so that one program serves a
bucket. Caches are a list with one pair of buffers per layer and are donated: a
step writes one position of them and copies nothing. For that the layers stand
one after the other, each with arrays of its own, and not in a scan.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refrag_jax.config.schema import DecoderConfig, ModelConfig
from refrag_jax.models import attention, layers, lora, splice
from refrag_jax.models.decoder import Block, rope_angles
from refrag_jax.models.refrag import Refrag
from refrag_jax.serve import sampling
from refrag_jax.sharding import constrain

NLL_BLOCK = 128  # tokens whose logits are there at once
Cache = list[dict[str, jax.Array]]  # of each layer: k and v, (B, M, S, H)


class Int8(NamedTuple):
  """A matrix in 8 bits, with a scale for each of its output channels."""

  values: jax.Array  # int8
  scale: jax.Array  # float32, 1 along the inputs


class Weights(NamedTuple):
  """A decoder's parameters as the engine keeps them, in the compute dtype.

  Matrices may be Int8.
  """

  embed_VD: jax.Array
  head_DV: jax.Array | Int8
  norm: dict[str, jax.Array]
  layers: list[Any]  # of each block its own


class Slots(NamedTuple):
  """What a pool holds on the devices; donated from step to step."""

  caches: Cache
  token_B: jax.Array  # int32, written last and not yet read by the decoder
  position_B: jax.Array  # int32, where that token will stand
  seen_BV: jax.Array  # bool, tokens of prompt and answer, for the penalty


# Of what `Slots` holds, by the number of its axes.
AXES = {4: ('batch', 'heads', None, None), 2: ('batch', None), 1: ('batch',)}


def unstack(params: dict, cfg: ModelConfig, int8: bool = False) -> Weights:
  """The parameters of `decoder`, layer by layer; adapters are merged before.

  Args:
    int8: keep the matrices in 8 bits; embeddings and norms stay as they are.
  """
  decoder, dtype = params['decoder'], jnp.dtype(cfg.compute_dtype)
  narrow = lambda x: x.astype(dtype)
  embed_VD = narrow(decoder['embed_tokens'])
  tied = cfg.decoder.tie_embeddings

  def matrix(x, num_in: int = 1):
    return quantized(x, num_in) if int8 else narrow(x)

  projections = lora.shapes(cfg.decoder)

  def of(path, x):
    *_, name, kind = (key.key for key in path)
    if kind == 'scale':
      return x  # norms compute in float32
    return matrix(x, projections[name][1]) if kind == 'kernel' else narrow(x)

  def of_layer(y):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: of(path, x[y]), decoder['layers']
    )

  return Weights(
    embed_VD,
    matrix(decoder['embed_tokens'].T if tied else decoder['lm_head']),
    decoder['norm'],
    [of_layer(y) for y in range(cfg.decoder.num_layers)],
  )


@functools.partial(jax.jit, static_argnames='num_in')
def quantized(x: jax.Array, num_in: int) -> Int8:
  """The nearest of 255 values, of each output channel's largest magnitude.

  Args:
    num_in: leading axes that a product sums over.
  """
  largest = jnp.abs(x).max(tuple(range(num_in)), keepdims=True)
  scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
  return Int8(jnp.round(x / scale).astype(jnp.int8), scale)


def _wide(tree: Any, dtype: jnp.dtype) -> Any:
  """Matrices of 8 bits as those of the compute dtype, one use long."""
  return jax.tree.map(
    lambda x: (x.values * x.scale).astype(dtype) if isinstance(x, Int8) else x,
    tree,
    is_leaf=lambda x: isinstance(x, Int8),
  )


@functools.partial(jax.jit, static_argnames=('cfg', 'rows', 'length'))
def new_slots(*, cfg: ModelConfig, rows: int, length: int) -> Slots:
  """A pool with nothing in it."""
  c = cfg.decoder
  shape = (rows, c.num_kv_heads, length, c.head_dim)
  zeros = lambda: jnp.zeros(shape, jnp.dtype(cfg.compute_dtype))
  slots = Slots(
    [{'k': zeros(), 'v': zeros()} for _ in range(c.num_layers)],
    jnp.zeros(rows, jnp.int32),
    jnp.full(rows, length, jnp.int32),  # outside: nothing is written there
    jnp.zeros((rows, c.vocab_size), bool),
  )
  return _placed(slots)


def _placed(slots: Slots) -> Slots:
  """The slots where they lie on a mesh, before and after every step alike.

  Where they did not, the next step would be compiled for another layout.
  """
  return jax.tree.map(lambda x: constrain(x, *AXES[x.ndim]), slots)


@functools.partial(jax.jit, static_argnames='model')
def encode(params: dict, encoder_XM, encoder_len_X, *, model: Refrag):
  """c_i of chunks of any requests, float32 (X, E)."""
  c_1XE = model.apply(
    {'params': params}, encoder_XM[None], encoder_len_X[None],
    method=Refrag.encode,
  )  # fmt: skip
  return c_1XE[0]


@functools.partial(jax.jit, static_argnames='model')
def score(params: dict, c_CE, valid_C, *, model: Refrag):
  """The policy's logit of each chunk of one request, float32 (C,)."""
  return model.apply(
    {'params': params}, c_CE[None], valid_C[None], method=Refrag.score
  )[0]


@functools.partial(jax.jit, static_argnames=('cfg', 'attend'))
def token_nll(
  weights: Weights, ids_T, first, *, cfg: DecoderConfig, attend: str
):
  """NLL of each token after those before it, float32 (T,).

  Args:
    ids_T: int32, a text; what is beyond its end is not looked at.
    first: int32, what the first token stands behind (BOS).
    attend: of attention.KINDS.
  """
  T = len(ids_T)
  before_T = jnp.concatenate([first[None], ids_T[:-1]])
  hidden_1TD, _ = _blocks(
    weights, weights.embed_VD[before_T][None], [{} for _ in weights.layers],
    jnp.arange(T, dtype=jnp.int32)[None], T, cfg, attend,
  )  # fmt: skip
  size = math.gcd(T, NLL_BLOCK)

  def of_block(block):
    hidden_SD, ids_S = block
    logprob_SV = jax.nn.log_softmax(logits(weights, hidden_SD))
    return -jnp.take_along_axis(logprob_SV, ids_S[:, None], 1)[:, 0]

  D = hidden_1TD.shape[-1]
  blocks = hidden_1TD.reshape(-1, size, D), ids_T.reshape(-1, size)
  return jax.lax.map(of_block, blocks).reshape(T)


@functools.partial(jax.jit, static_argnames=('model', 'length'))
def spliced(
  params: dict, embed_VD, batch: dict, c_CE, expand_C, *, model: Refrag,
  length: int,
):  # fmt: skip
  """One request's input to the decoder, (1, T, D), and how much of it there is.

  Args:
    params: with encoder, projection and policy.
    batch: prefix, chunks and what is given of the answer, one row.
    c_CE: chunk embeddings before the projection.
    expand_C: bool, chunks that stay tokens.
    length: T, static.
  """
  e_1CD = model.apply({'params': params}, c_CE[None], method=Refrag.project)
  layout = splice.build_layout(
    batch['prefix_BQ'], batch['prefix_len_B'], batch['chunks_BCK'],
    batch['chunk_len_BC'], expand_C[None], batch['output_BO'],
    batch['output_len_B'], length,
  )  # fmt: skip
  x_1TD = splice.fill(layout, embed_VD[layout.token_BT], e_1CD)
  return x_1TD, layout.valid_BT.sum(1, dtype=jnp.int32)[0]


@functools.partial(
  jax.jit, static_argnames=('cfg', 'attend'), donate_argnames='slots'
)
def prefill(
  weights: Weights, slots: Slots, row, x_1TD, length, seen_V,
  settings: sampling.Settings, *, cfg: DecoderConfig, attend: str,
):  # fmt: skip
  """Reads a request into a slot and draws its first token.

  Args:
    row: which slot, int32.
    x_1TD: the decoder's input; T is at most a slot's length.
    length: how much of it there is, int32.
    seen_V: bool, tokens of the prompt.
    settings: one row's.
    attend: of attention.KINDS.

  Returns:
    The slots; the token, (1,), and its log-probability.
  """
  T = x_1TD.shape[1]
  caches = [{} for _ in weights.layers]
  positions_1T = jnp.arange(T, dtype=jnp.int32)[None]
  hidden_1TD, caches = _blocks(
    weights, x_1TD, caches, positions_1T, T, cfg, attend
  )
  last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, length - 1, 1, False)
  token_1, logprob_1 = sampling.sample(
    logits(weights, last_1D), seen_V[None], settings, length[None]
  )
  placed = [
    {
      name: jax.lax.dynamic_update_slice(pool[name], new[name], (row, 0, 0, 0))
      for name in pool
    }
    for pool, new in zip(slots.caches, caches, strict=True)
  ]
  seen_V = seen_V.at[token_1[0]].set(True)
  new = Slots(
    placed,
    slots.token_B.at[row].set(token_1[0]),
    slots.position_B.at[row].set(length),
    slots.seen_BV.at[row].set(seen_V),
  )
  return _placed(new), token_1, logprob_1


@functools.partial(
  jax.jit, static_argnames=('cfg', 'attend', 'live'), donate_argnames='slots'
)
def decode(
  weights: Weights, slots: Slots, active_B, settings: sampling.Settings, *,
  cfg: DecoderConfig, attend: str, live: int,
):  # fmt: skip
  """One token more for every active row; the others stay as they are.

  Args:
    active_B: bool.
    attend: of attention.KINDS.
    live: positions that are looked at, static; no active row has more.

  Returns:
    The slots; tokens (B,) and their log-probabilities.
  """
  S = slots.caches[0]['k'].shape[2]
  place_B = jnp.where(active_B, slots.position_B, S)
  x_B1D = weights.embed_VD[slots.token_B][:, None]
  hidden_B1D, caches = _blocks(
    weights, x_B1D, slots.caches, place_B[:, None], live, cfg, attend
  )
  token_B, logprob_B = sampling.sample(
    logits(weights, hidden_B1D[:, 0]), slots.seen_BV, settings, place_B + 1
  )
  rows_B = jnp.arange(len(token_B))
  seen_BV = slots.seen_BV.at[rows_B, token_B].max(active_B)
  new = Slots(
    caches,
    jnp.where(active_B, token_B, slots.token_B),
    slots.position_B + active_B,
    seen_BV,
  )
  return _placed(new), token_B, logprob_B


def logits(weights: Weights, hidden_BD) -> jax.Array:
  """float32 (B, V)."""
  head_DV = _wide(weights.head_DV, hidden_BD.dtype)
  return layers.einsum32('BD,DV->BV', hidden_BD, head_DV)


def _blocks(weights, x_BTD, caches, positions_BT, live, cfg, attend):
  """All layers: normed hidden states, and the caches with what was read."""
  angles = rope_angles(cfg, positions_BT)
  query = attention.Places(positions_BT)
  key = attention.Places(jnp.arange(live, dtype=jnp.int32)[None])
  block, new = Block(cfg, attend, None, None), []
  for layer, cache in zip(weights.layers, caches, strict=True):
    variables = {'params': _wide(layer, x_BTD.dtype)}
    x_BTD, cache = block.apply(
      variables, x_BTD, cache, angles, query, key, None
    )
    new.append(cache)
  norm = layers.RMSNorm(cfg.norm_eps)
  return norm.apply({'params': weights.norm}, x_BTD), new
