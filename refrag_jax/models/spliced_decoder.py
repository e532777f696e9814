"""What REFRAG and its baseline CEPE share: a decoder over a batch's layout.

Dimension key: B batch, T decoder positions, O output slots, D decoder width,
V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refrag_jax.config.schema import ModelConfig
from refrag_jax.models import losses, splice
from refrag_jax.sharding import constrain


class SplicedDecoder(nn.Module):
  """A model whose `setup` makes `self.decoder`; batches as in data/batch.py."""

  cfg: ModelConfig

  def run(self, layout: splice.Layout, e_BCD=None, cache=None, memory=None):
    """The decoder over a layout: hidden_BTD and the cache, if one came in."""
    embeds_BTD = splice.fill(layout, self.decoder.embed(layout.token_BT), e_BCD)
    B, T = layout.token_BT.shape
    positions_BT = jnp.broadcast_to(
      jnp.arange(T, dtype=jnp.int32)[None], (B, T)
    )
    return self.decoder(embeds_BTD, positions_BT, cache=cache, memory=memory)

  def outputs(self, layout: splice.Layout, e_BCD=None, memory=None):
    """Hidden states that predict the outputs of a layout, (B, O, D)."""
    hidden_BTD, _ = self.run(layout, e_BCD, memory=memory)
    hidden_BOD = jnp.take_along_axis(hidden_BTD, layout.output_BO[..., None], 1)
    return constrain(hidden_BOD, 'batch', 'sequence', None)

  def nll(self, hidden_BOD, target_BO) -> jax.Array:
    """-log p of each target, float32 (B, O), nats."""
    return losses.token_nll(
      hidden_BOD, self.head(), target_BO, self.cfg.loss_block
    )

  def head(self) -> jax.Array:
    """The output matrix, float32 (D, V)."""
    return self.decoder.head()
