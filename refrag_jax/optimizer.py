"""AdamW, clipping, and the one warm-up and cosine of a stage.

Paper B.2: AdamW, 4 % linear warm-up, cosine, one schedule over the whole stage.
Betas, weight decay and clip are not stated there; these are those of
princeton-nlp/CEPE, which the paper says that it follows.
"""

import math

import optax

BETAS = (0.9, 0.999)
EPS = 1e-8
CLIP_NORM = 1.0
WARMUP_FRACTION = 0.04


def make_tx() -> optax.GradientTransformation:
  """Clip and AdamW direction; the learning rate is an argument of the step.

  So that one compiled program serves every stage of the same shapes. Weight
  decay is 0, hence Adam's direction is AdamW's.
  """
  return optax.chain(
    optax.clip_by_global_norm(CLIP_NORM),
    optax.scale_by_adam(b1=BETAS[0], b2=BETAS[1], eps=EPS),
  )


def learning_rate(step: int, num_steps: int, peak: float) -> float:
  """Linear warm-up over the first 4 %, then a cosine to 0; on the host."""
  warmup = max(1, round(WARMUP_FRACTION * num_steps))
  if step < warmup:
    return peak * (step + 1) / warmup
  progress = (step - warmup) / max(1, num_steps - warmup)
  return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
