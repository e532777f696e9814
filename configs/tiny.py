"""The embedded default: every stage on the interpreter's own documentation.

  launch/run.sh --config=configs/tiny.py --workdir=runs/tiny

No download beyond packages; six stages, the control arms and the evals in
minutes on two CPU cores (README has the time of each part). Why these
numbers: short outputs and large batches make the chunks matter, the rest of
the budget goes to the decoder, which must learn to copy before it is frozen.
"""

from configs import common

PRESETS = {
  'long': 'larger batches, more steps and windows: lower losses, less noise',
  'smoke': 'two steps a stage of a toy model, to see that it all runs',
}
DURATIONS = {
  '': '8 minutes on two idle CPU cores',
  'long': '12 minutes on two idle CPU cores, 22 on busy ones',
  'smoke': '100 seconds on two idle CPU cores',
}
# stage: (steps, batch) of the ten minutes, and of `long`; control arms follow.
BUDGETS = {
  'lm': ((1200, 16), (1200, 16)),
  'reconstruct': ((500, 64), (600, 128)),
  'cpt': ((250, 64), (250, 128)),
  'mixed': ((120, 64), (100, 128)),
  'grpo': ((80, 32), (100, 32)),
  'sft': ((40, 32), (80, 32)),
}


def get_config(preset: str = ''):
  c = common.base()
  c.name = 'tiny'
  c.stages = (
    'lm',
    'reconstruct',
    'cpt',
    'mixed',
    'grpo',
    'sft',
    # The control arms: the same continued training without compression.
    'cpt_trained',
    'mixed_trained',
    'sft_full',
    'sft_none',
  )
  c.evals = ('log_perplexity', 'reconstruction', 'selection', 'qa')

  c.model.decoder = common.decoder('tiny', vocab_size=264)
  c.model.encoder = common.encoder('tiny', vocab_size=264)
  c.model.encoder.mlp_width = 256
  c.model.remat = 'dots'  # on a CPU quicker than keeping everything
  c.model.chunk_size = 8  # k, here in bytes
  c.data.max_encoder_tokens = 11  # 8 bytes, CLS, SEP and a torn character
  c.data.heldout_fraction = 0.15  # some 200 documents for the standard errors
  c.data.num_passages = 2

  c.stage.lm = common.stage(
    peak_learning_rate=3e-3,
    output_length=128,
    periodic_fraction=0.4,
  )
  c.stage.reconstruct = common.stage(
    peak_learning_rate=4e-3,
    context_length=64,
    factors=(1, 2, 4, 8),
  )
  c.stage.cpt = common.stage(
    peak_learning_rate=1.5e-3,
    context_length=64,
    output_length=16,
    factors=(1, 2, 4, 8),
  )
  c.stage.mixed = common.stage(
    peak_learning_rate=1e-3,
    context_length=64,
    output_length=16,
    expand_fractions=(0.25,),  # 0.1 of 8 chunks, the paper's share, is none
  )
  c.stage.grpo = common.stage(
    peak_learning_rate=1e-3,
    context_length=64,
    output_length=16,
    expand_fractions=(0.125, 0.25),
    num_generations=8,
    clip_eps=0.2,
    updates_per_rollout=2,
  )
  c.stage.sft = common.stage(
    peak_learning_rate=1e-3,
  )
  contexts = ('none', 'last_k', 'full')
  # All of the context at every step: the same windows and targets, and a
  # control that is, if anything, stronger than one that follows the curriculum.
  c.stage.cpt_trained = common.control(
    c.stage.cpt, contexts=contexts, factors=()
  )
  c.stage.mixed_trained = common.control(c.stage.mixed, contexts=contexts)
  c.stage.sft_full = common.control(c.stage.sft, contexts=('full',))
  c.stage.sft_none = common.control(c.stage.sft, contexts=('none',))

  c.checkpoint_every_seconds = 60.0

  c.eval.num_windows = 448 if preset == 'long' else 256
  c.eval.output_lengths = (4, 8, 16)
  c.eval.reconstruct_lengths = (8, 16, 32, 64)
  c.eval.expand_fractions = (0.125, 0.25)
  c.eval.tail_chunks = 2

  for name, budgets in BUDGETS.items():
    steps, batch_size = budgets[preset == 'long']
    c.stage[name].num_train_steps = steps
    c.stage[name].batch_size = batch_size
  if preset == 'long':
    c.name = 'tiny_long'
  # Texts on the screen within three minutes.
  c.sample_every_steps = 0 if preset == 'long' else 50
  if preset == 'smoke':
    _smoke(c)
  return c


def _smoke(c):
  """Two steps a stage, 16 wide: for tests and for a first look."""
  c.name = 'tiny_smoke'
  for size in (c.model.decoder, c.model.encoder, c.model.policy):
    size.update(num_layers=1, num_heads=2, mlp_width=32)
  c.model.decoder.update(width=16, num_kv_heads=1, head_dim=8)
  c.model.encoder.width = 16
  c.log_every_steps = 1
  for name in ('lm', 'reconstruct', 'cpt', 'mixed', 'grpo', 'sft'):
    # The control arms follow the stage that they repeat.
    c.stage[name].num_train_steps = 2
    c.stage[name].batch_size = 8
  c.stage.grpo.num_generations = 4
  c.data.num_passages = 2
  c.eval.num_windows = 8
  c.eval.batch_size = 8
  c.eval.num_questions = 8
