"""The encoders by their `kind` in the config."""

from refrag_jax.models.encoder import Encoder
from refrag_jax.models.modernbert import ModernBert

ENCODERS = {'bert': Encoder, 'modernbert': ModernBert}
