"""REFRAG: encoder, projection, decoder and policy, composed (paper section 2).

Dimension key: B batch, Q prefix slots, C chunks (the paper's L), K chunk size
(k), M encoder tokens of a chunk, O output slots, T decoder positions, E encoder
width, D decoder width, X = B * C chunks folded, or any texts to encode.

    chunks --encode--> c_i --project--> e_i --splice--> decoder --> nll
                        +----score----> s_i (which chunks to expand)

All chunks of a batch go through one encoder call.
"""

import dataclasses

import jax
import jax.numpy as jnp

from refrag_jax.config.schema import ModelConfig
from refrag_jax.models import cepe, lora, losses, splice
from refrag_jax.models.decoder import Decoder
from refrag_jax.models.encoders import ENCODERS
from refrag_jax.models.policy import Policy
from refrag_jax.models.projection import ChunkProjection
from refrag_jax.models.spliced_decoder import SplicedDecoder


class Refrag(SplicedDecoder):
  """Call as `model.apply({'params': params}, ..., method=Refrag.project)`."""

  def setup(self):
    c = self.cfg
    dtype = jnp.dtype(c.compute_dtype)
    run = (dtype, c.remat, c.scan_layers)
    self.encoder = ENCODERS[c.encoder.kind](c.encoder, *run)
    self.projection = ChunkProjection(c.decoder.width)
    self.lora = lora.Adapters(c.decoder, c.lora) if c.lora.rank else None
    self.decoder = Decoder(c.decoder, *run, c.attention, lora=self.lora)
    self.policy = Policy(c.policy)

  def encode(self, encoder_BCM, encoder_len_BC) -> jax.Array:
    """c_i of every chunk, float32 (B, C, E)."""
    B, C, M = encoder_BCM.shape
    c_XE = self.encoder(encoder_BCM.reshape(-1, M), encoder_len_BC.reshape(-1))
    return c_XE.reshape(B, C, -1)

  def chunk_embeddings(self, batch) -> jax.Array:
    """`encode` of a batch's chunks, (B, C, E): what can be cached."""
    return self.encode(batch['encoder_BCM'], batch['encoder_len_BC'])

  def encoder_states(self, ids_XM, len_X) -> jax.Array:
    """The encoder's state of every token, (X, M, E) in compute dtype."""
    return self.encoder.states(ids_XM, len_X)

  def project(self, c_BCE) -> jax.Array:
    """e_i = phi(c_i), float32 (B, C, D)."""
    return self.projection(c_BCE)

  def project_chunks(self, batch) -> jax.Array:
    """`project` of a batch's chunks, which are encoded for it, (B, C, D)."""
    return self.project(self.chunk_embeddings(batch))

  def score(self, c_BCE, valid_BC) -> jax.Array:
    """The policy's logit for each chunk, float32 (B, C)."""
    return self.policy(c_BCE, valid_BC)

  def chunk_scores(self, batch) -> jax.Array:
    """`score` of a batch's chunks, which are encoded for it, (B, C)."""
    return self.score(self.chunk_embeddings(batch), batch['chunk_len_BC'] > 0)

  def output_states(self, batch, c_BCE, expand_BC, num_expanded: int):
    """The states that predict the outputs, (B, O, D); as `output_nll`."""
    layout = splice.layout_of(batch, expand_BC, num_expanded)
    e_BCD = None if c_BCE is None else self.project(c_BCE)
    return self.outputs(layout, e_BCD)

  def output_nll(self, batch, c_BCE, expand_BC, num_expanded: int) -> jax.Array:
    """NLL of every output token given the (partly expanded) context, (B, O).

    Args:
      c_BCE: chunk embeddings before the projection; None with every chunk
        expanded.
      expand_BC: bool, chunks that stay tokens; at most `num_expanded` (static)
        True in a row.
    """
    hidden_BOD = self.output_states(batch, c_BCE, expand_BC, num_expanded)
    return self.nll(hidden_BOD, batch['output_BO'])

  def compressed_nll(self, batch) -> jax.Array:
    """NLL of every output token with nothing expanded, (B, O)."""
    c_BCE = self.chunk_embeddings(batch)
    none_BC = jnp.zeros(c_BCE.shape[:2], bool)
    return self.output_nll(batch, c_BCE, none_BC, 0)

  def mixed_nll(self, batch, num_expanded: int) -> jax.Array:
    """NLL of every output token, chunks of `expand_BC` as tokens, (B, O)."""
    c_BCE = self.chunk_embeddings(batch)
    return self.output_nll(batch, c_BCE, batch['expand_BC'], num_expanded)

  def distilled(
    self, batch, num_expanded: int, temperature: float
  ) -> tuple[jax.Array, jax.Array]:
    """NLL of every output token and its KL from a teacher's, each (B, O).

    Args:
      batch: with teacher_BOD, the states that predict the same outputs there.
      num_expanded: chunks of `expand_BC` that are tokens; 0: none.
    """
    c_BCE = self.chunk_embeddings(batch)
    none_BC = jnp.zeros(c_BCE.shape[:2], bool)
    expand_BC = batch['expand_BC'] if num_expanded else none_BC
    hidden_BOD = self.output_states(batch, c_BCE, expand_BC, num_expanded)
    kl_BO = losses.token_kl(
      hidden_BOD,
      batch['teacher_BOD'],
      self.head(),
      temperature,
      self.cfg.loss_block,
    )
    return self.nll(hidden_BOD, batch['output_BO']), kl_BO

  def plain_nll(self, batch, context: str) -> jax.Array:
    """NLL by the decoder alone, (B, O); context as in `plain_states`."""
    hidden_BOD = self.plain_states(batch, context)
    return self.nll(hidden_BOD, batch['output_BO'])

  def plain_states(self, batch, context: str) -> jax.Array:
    """The decoder alone: the states that predict the outputs, (B, O, D).

    Its context is 'none', 'last_k' or 'full', as tokens. 'last_k' keeps as many
    last context tokens as REFRAG has chunk positions (LLaMA_K of the paper's
    Table 1); contexts without ragged chunks only.
    """
    chunks_BCK, len_BC = batch['chunks_BCK'], batch['chunk_len_BC']
    B, C, K = chunks_BCK.shape
    if context == 'none':
      chunks_BCK, len_BC = chunks_BCK[:, :0], len_BC[:, :0]
    elif context == 'last_k':
      chunks_BCK = chunks_BCK.reshape(B, 1, C * K)[:, :, C * K - C :]
      len_BC = jnp.full((B, 1), C, jnp.int32)
    elif context != 'full':
      raise ValueError(f'no context {context!r}')
    batch = batch | {'chunks_BCK': chunks_BCK, 'chunk_len_BC': len_BC}
    all_BC = jnp.ones(len_BC.shape, bool)
    return self.output_states(batch, None, all_BC, len_BC.shape[1])

  def next_token_nll(self, batch) -> tuple[jax.Array, jax.Array]:
    """NLL of each next token of packed rows, (B, T - 1), and its mask.

    A target is predicted from its own segment alone.
    """
    tokens_BT, segment_ids_BT = batch['tokens_BT'], batch['segment_ids_BT']
    hidden_BTD = self.lm(tokens_BT, batch['positions_BT'], segment_ids_BT)
    nll_BT = self.nll(hidden_BTD[:, :-1], tokens_BT[:, 1:])
    mask_BT = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (
      segment_ids_BT[:, 1:] > 0
    )
    return nll_BT, mask_BT

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


def init_params(cfg: ModelConfig, key: jax.Array) -> dict:
  """Fresh float32 parameters of the four groups, of `lora` and `cross` if asked
  for.
  """

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
    model.output_states(batch, c_BCE, ~valid_BC, 0)
    model.head()

  # How attention is computed changes no parameter, and may not work here.
  cfg = dataclasses.replace(cfg, attention='dense')
  params = Refrag(cfg).init(key, method=touch_all)['params']
  if cfg.piece_length:  # the run has the baseline CEPE
    params |= {'cross': cepe.init_cross(cfg, key)}
  return params
