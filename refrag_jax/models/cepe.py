"""CEPE (Yen et al. 2024): the baseline that reads its context from the side.

Dimension key: B batch, P pieces of a context, M encoder tokens of a piece,
S = P * M + 1 states to read, X = B * P pieces folded, O output slots, T decoder
positions, E encoder width, D decoder width, N query heads, J key/value heads,
H head dimension, Y layers.

    pieces --encode--> states of all tokens ----+ keys, values
                                                v
    [BOS, y_1 ... y_{o-1}] --> (attention, cross-attention, MLP) x Y --> hidden

The paper's strongest baseline (its section 4). Decoder and encoder are those of
REFRAG and read the same parameters; the cross-attention alone is new, the fifth
group `cross`, there only in runs that ask for it (`model.piece_length`). As in
princeton-nlp/CEPE it stands in every block between attention and MLP, has its
own RMSNorm, no biases and no positions: in what order pieces stand is lost, and
a piece's tokens are told apart by the encoder's positions alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import DecoderConfig, ModelConfig
from refrag_jax.models import layers, splice
from refrag_jax.models.decoder import Decoder
from refrag_jax.models.encoders import ENCODERS
from refrag_jax.models.spliced_decoder import SplicedDecoder


class CrossAttention(nn.Module):
  """From the decoder's positions to the context's states, with residual."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_BTD, memory):
    c = self.cfg
    states_BSE, readable_BS = memory
    B, T, D = x_BTD.shape
    S, E = states_BSE.shape[1:]
    N, J, H = c.num_heads, c.num_kv_heads, c.head_dim
    dense = layers.Projection
    h_BTD = layers.RMSNorm(c.norm_eps, name='layernorm')(x_BTD)
    q_BTNH = dense((D, N, H), 1, False, name='q_proj')(h_BTD)
    k_BSJH = dense((E, J, H), 1, False, name='k_proj')(states_BSE)
    v_BSJH = dense((E, J, H), 1, False, name='v_proj')(states_BSE)
    mask_BTS = jnp.broadcast_to(readable_BS[:, None], (B, T, S))
    out_BTNH = layers.attention(q_BTNH, k_BSJH, v_BSJH, mask_BTS)
    return x_BTD + dense((N, H, D), 2, False, name='o_proj')(out_BTNH)


class Cepe(SplicedDecoder):
  """Call as `Cepe(cfg).apply({'params': params}, ..., method=Cepe.output_nll)`.

  `params` are those of `refrag.init_params`; other groups in there are not
  read.
  """

  def setup(self):
    c = self.cfg
    dtype = jnp.dtype(c.compute_dtype)
    run = (dtype, c.remat, c.scan_layers)
    self.encoder = ENCODERS[c.encoder.kind](c.encoder, *run)
    self.cross = CrossAttention(c.decoder)
    self.decoder = Decoder(c.decoder, *run, c.attention, self.cross)

  def encode(self, piece_BPM, piece_len_BP) -> tuple[jax.Array, jax.Array]:
    """The states of every token of every piece, each piece encoded alone.

    Behind them stands one state of zeros, which is readable where nothing else
    is: there are no biases, so its value is zero, and a row without context is
    the plain decoder.

    Returns:
      states_BSE in compute dtype, and bool readable_BS, False on padding.
    """
    B, P, M = piece_BPM.shape
    states_XME = self.encoder.states(
      piece_BPM.reshape(-1, M), piece_len_BP.reshape(-1)
    )
    states_BSE = states_XME.reshape(B, P * M, states_XME.shape[-1])
    real_BPM = jnp.arange(M)[None, None] < piece_len_BP[..., None]
    real_BS = real_BPM.reshape(B, P * M)
    nothing_B1 = ~real_BS.any(1, keepdims=True)
    return (
      jnp.pad(states_BSE, ((0, 0), (0, 1), (0, 0))),
      jnp.concatenate([real_BS, nothing_B1], axis=1),
    )

  def output_states(self, batch, memory) -> jax.Array:
    """Hidden states that predict the outputs, (B, O, D).

    Args:
      batch: its prefix and output are read; its chunks are not.
      memory: as `encode` returns it.
    """
    alone = batch | {
      'chunks_BCK': batch['chunks_BCK'][:, :0],
      'chunk_len_BC': jnp.zeros((len(batch['output_BO']), 0), jnp.int32),
    }
    none_BC = jnp.zeros(alone['chunk_len_BC'].shape, bool)
    return self.outputs(splice.layout_of(alone, none_BC, 0), memory=memory)

  def output_nll(self, batch) -> jax.Array:
    """NLL of every output token, (B, O), by attention to the pieces.

    Args:
      batch: with piece_BPM and piece_len_BP (0 = absent); P may be 0.
    """
    memory = self.encode(batch['piece_BPM'], batch['piece_len_BP'])
    return self.nll(self.output_states(batch, memory), batch['output_BO'])


def init_cross(cfg: ModelConfig, key: jax.Array) -> dict:
  """Fresh float32 parameters of the group `cross`, stacked over layers."""

  def touch_all(model):
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    batch = {
        'prefix_BQ': zeros(1, 1), 'prefix_len_B': zeros(1) + 1,
        'chunks_BCK': zeros(1, 0, cfg.chunk_size),
        'output_BO': zeros(1, 2), 'output_len_B': zeros(1) + 2,
    }  # fmt: skip
    model.output_states(batch, model.encode(zeros(1, 1, 3), zeros(1, 1) + 3))

  return Cepe(cfg).init(key, method=touch_all)['params']['cross']


def copy_self_attention(params: dict) -> dict:
  """Starts a fresh `cross` as CEPE does: from the decoder's own attention.

  Keys and values take what acts on the first E of the D inputs, the norm is
  that of the MLP. Where the encoder is wider than the decoder (E > D) keys and
  values stay random.
  """
  own = params['decoder']['layers']
  source = {  # without the biases that some decoders have
    name: {'kernel': own[name]['kernel']}
    for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
  } | {'layernorm': own['post_attention_layernorm']}

  def copy(fresh, old):
    old = old[:, : fresh.shape[1]]
    # A copy, not the same buffer: a step donates both.
    return jnp.copy(old) if old.shape == fresh.shape else fresh

  return params | {'cross': jax.tree.map(copy, params['cross'], source)}
