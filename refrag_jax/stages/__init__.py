"""The stages by name; the order of a run comes from `config.stages`."""

from refrag_jax.stages import cepe, compressed, control, grpo, lm, mlm
from refrag_jax.stages.stage import Stage

STAGES: dict[str, Stage] = {
  'lm': lm.STAGE,
  'mlm': mlm.STAGE,
  'reconstruct': compressed.RECONSTRUCT,
  'cpt': compressed.CPT,
  'mixed': compressed.MIXED,
  'grpo': grpo.STAGE,
  'sft': compressed.SFT,
  # Control arms (design.md section 4): never part of REFRAG itself.
  'cpt_trained': control.control('lm'),
  'mixed_trained': control.control('cpt_trained'),
  'sft_full': control.control('mixed_trained'),
  'sft_none': control.control('mixed_trained'),
  'reconstruct_unfrozen': compressed.RECONSTRUCT_UNFROZEN,
  'cpt_frozen': compressed.CPT_FROZEN,
  # The paper's strongest baseline.
  'cepe_warmup': cepe.WARMUP,
  'cepe': cepe.CEPE,
  'cepe_unfrozen': cepe.UNFROZEN,
}
