"""AdamW, clipping, and the one warm-up and decay of a stage.

Paper B.2: AdamW, 4 % linear warm-up, cosine, one schedule over the whole stage;
configs/common.py has these, and what is not stated there.
"""

import math

import jax
import optax

from refrag_jax.config.schema import OptimizerConfig
from refrag_jax.sharding import path_str

DEFAULT = OptimizerConfig(
  betas=(0.9, 0.999),
  eps=1e-8,
  clip_norm=1.0,
  weight_decay=0.0,
  warmup_fraction=0.04,
  schedule='cosine',
)
SCHEDULES = {
  'cosine': lambda share: 0.5 * (1 + math.cos(math.pi * share)),
  'linear': lambda share: 1 - share,
  'constant': lambda share: 1.0,
}


def make_tx(cfg: OptimizerConfig = DEFAULT) -> optax.GradientTransformation:
  """Clip and AdamW direction; the learning rate is an argument of the step.

  So that one compiled program serves every stage of the same shapes. Weight
  decay is of kernels and embeddings: norms and biases are not decayed.
  """
  parts = [
    optax.clip_by_global_norm(cfg.clip_norm),
    optax.scale_by_adam(b1=cfg.betas[0], b2=cfg.betas[1], eps=cfg.eps),
  ]
  if cfg.weight_decay:
    parts.append(optax.add_decayed_weights(cfg.weight_decay, decayed))
  return optax.chain(*parts)


def decayed(params: dict) -> dict:
  """True for the parameters that weight decay is of."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not path_str(path).endswith(('scale', 'bias')), params
  )


def learning_rate(
  step: int, num_steps: int, peak: float, cfg: OptimizerConfig = DEFAULT
) -> float:
  """Linear warm-up over the first steps, then the schedule; on the host."""
  warmup = max(1, round(cfg.warmup_fraction * num_steps))
  if step < warmup:
    return peak * (step + 1) / warmup
  progress = (step - warmup) / max(1, num_steps - warmup)
  return peak * SCHEDULES[cfg.schedule](min(1.0, progress))
