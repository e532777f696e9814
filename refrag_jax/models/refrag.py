"""REFRAG: encoder, projection, decoder and policy, composed (paper section 2).

Dimension key: B batch, Q prefix slots, C chunks (the paper's L), K chunk size
(k), M encoder tokens of a chunk, O output slots, T decoder positions, E encoder
width, D decoder width, X = B * C chunks folded, or any texts to encode.

    chunks --encode--> c_i --project--> e_i --splice--> decode --> hidden
                        +----score----> s_i (which chunks to expand)

All chunks of a batch go through one encoder call.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import ModelConfig
from refrag_jax.models import cepe, splice
from refrag_jax.models.decoder import Decoder
from refrag_jax.models.encoders import ENCODERS
from refrag_jax.models.policy import Policy
from refrag_jax.models.projection import ChunkProjection
from refrag_jax.sharding import constrain


class Refrag(nn.Module):
  """Call a method with `model.apply({'params': params}, ..., method=...)`."""

  cfg: ModelConfig

  def setup(self):
    c = self.cfg
    dtype = jnp.dtype(c.compute_dtype)
    run = (dtype, c.remat, c.scan_layers)
    self.encoder = ENCODERS[c.encoder.kind](c.encoder, *run)
    self.projection = ChunkProjection(c.decoder.width)
    self.decoder = Decoder(c.decoder, *run, c.attention)
    self.policy = Policy(c.policy)

  def encode(self, encoder_BCM, encoder_len_BC) -> jax.Array:
    """c_i of every chunk, float32 (B, C, E)."""
    B, C, M = encoder_BCM.shape
    c_XE = self.encoder(encoder_BCM.reshape(-1, M), encoder_len_BC.reshape(-1))
    return c_XE.reshape(B, C, -1)

  def encoder_states(self, ids_XM, len_X) -> jax.Array:
    """The encoder's state of every token, (X, M, E) in compute dtype."""
    return self.encoder.states(ids_XM, len_X)

  def project(self, c_BCE) -> jax.Array:
    """e_i = phi(c_i), float32 (B, C, D)."""
    return self.projection(c_BCE)

  def score(self, c_BCE, valid_BC) -> jax.Array:
    """The policy's logit for each chunk, float32 (B, C)."""
    return self.policy(c_BCE, valid_BC)

  def decode(self, batch, e_BCD, expand_BC, num_expanded: int):
    """Hidden states that predict the outputs, (B, O, D).

    Args:
      batch: prefix_BQ, prefix_len_B, chunks_BCK, chunk_len_BC, output_BO,
        output_len_B (data/pipeline.py has the format).
      e_BCD: chunk embeddings; None where every chunk is expanded.
      expand_BC: bool; at most `num_expanded` (static) True in a row.
    """
    layout = self.layout(batch, expand_BC, num_expanded)
    hidden_BTD, _ = self.run(layout, e_BCD)
    hidden_BOD = jnp.take_along_axis(hidden_BTD, layout.output_BO[..., None], 1)
    return constrain(hidden_BOD, 'batch', 'sequence', None)

  def layout(self, batch, expand_BC, num_expanded: int) -> splice.Layout:
    chunks_BCK = batch['chunks_BCK']
    T = splice.num_positions(
      batch['prefix_BQ'].shape[1],
      chunks_BCK.shape[1],
      chunks_BCK.shape[2],
      batch['output_BO'].shape[1],
      num_expanded,
    )
    return splice.build_layout(
        batch['prefix_BQ'], batch['prefix_len_B'], chunks_BCK,
        batch['chunk_len_BC'], expand_BC, batch['output_BO'],
        batch['output_len_B'], T,
    )  # fmt: skip

  def run(self, layout: splice.Layout, e_BCD, cache=None):
    """The decoder over a layout: hidden_BTD and the cache, if one came in."""
    embeds_BTD = splice.fill(layout, self.decoder.embed(layout.token_BT), e_BCD)
    B, T = layout.token_BT.shape
    positions_BT = jnp.broadcast_to(
      jnp.arange(T, dtype=jnp.int32)[None], (B, T)
    )
    return self.decoder(embeds_BTD, positions_BT, cache=cache)

  def lm(self, tokens_BT, positions_BT, segment_ids_BT) -> jax.Array:
    """The plain decoder over packed rows, hidden_BTD."""
    embeds_BTD = self.decoder.embed(tokens_BT)
    return self.decoder(embeds_BTD, positions_BT, segment_ids_BT)[0]

  def step(self, token_B, position_B, cache):
    """One token a row against the cache: hidden_BD and the new cache."""
    embeds_B1D = self.decoder.embed(token_B[:, None])
    hidden_B1D, cache = self.decoder(
      embeds_B1D, position_B[:, None], cache=cache
    )
    return hidden_B1D[:, 0], cache

  def head(self) -> jax.Array:
    """The output matrix, float32 (D, V)."""
    return self.decoder.head()


def init_params(cfg: ModelConfig, key: jax.Array) -> dict:
  """Fresh float32 parameters of the four groups, of `cross` if asked for."""

  def touch_all(model):
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    batch = {
        'prefix_BQ': zeros(1, 1), 'prefix_len_B': zeros(1) + 1,
        'chunks_BCK': zeros(1, 1, cfg.chunk_size), 'chunk_len_BC': zeros(1, 1),
        'output_BO': zeros(1, 2), 'output_len_B': zeros(1) + 2,
    }  # fmt: skip
    c_BCE = model.encode(zeros(1, 1, 3), zeros(1, 1) + 3)
    valid_BC = zeros(1, 1) == 0
    model.score(c_BCE, valid_BC)
    model.decode(batch, model.project(c_BCE), ~valid_BC, 0)
    model.head()

  # How attention is computed changes no parameter, and may not work here.
  cfg = dataclasses.replace(cfg, attention='dense')
  params = Refrag(cfg).init(key, method=touch_all)['params']
  if cfg.piece_length:  # the run has the baseline CEPE
    params |= {'cross': cepe.init_cross(cfg, key)}
  return params
