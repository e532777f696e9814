"""A real pair: SmolLM2-135M-Instruct and MiniLM-L6, adapters on the decoder.

  launch/models.sh                                 # once: both, into models/
  launch/run.sh --config=configs/smollm2.py:laptop --workdir=runs/smollm2

The decoder comes from llama.cpp's file of it, 4 bits a weight, and stays as it
is: `reconstruct` trains encoder and projection, every later stage those and
adapters of rank 16 (LoRA), and so do the control arms. Name your own text in
--config.data.text; without it, it is the interpreter's documentation.
"""

from configs import common

PRESETS = {
  'laptop': 'a first look, on two CPU cores',
}
DURATIONS = {
  '': 'a night on two CPU cores, by estimate',
  'laptop': 'an hour on two CPU cores, by estimate',
}
DECODER = 'models/SmolLM2-135M-Instruct.Q4_1.gguf'
ENCODER = 'models/all-MiniLM-L6-v2'
# stage: steps of a night, and of the laptop's hour.
STEPS = {'reconstruct': (1000, 80), 'cpt': (500, 30)}


def get_config(preset: str = ''):
  c = common.base()
  c.name = 'smollm2'
  c.stages = ('reconstruct', 'cpt', 'cpt_trained')
  c.evals = ('log_perplexity', 'reconstruction', 'regeneration')
  # Numbers that are known need no file, so that --mode=config lists them.
  c.model.decoder = common.decoder('smollm2_135m', 49_152)
  c.model.encoder = common.encoder('minilm_l6', 30_522)
  c.init_from = f'{DECODER},{ENCODER}'
  c.data.tokenizer, c.data.encoder_tokenizer = DECODER, ENCODER

  c.model.lora.rank = 16
  c.model.chunk_size = 8
  c.data.max_encoder_tokens = 24
  c.model.policy.update(num_heads=c.model.encoder.num_heads, mlp_width=1024)
  factors = (1, 2, 4, 8)
  c.stage.reconstruct = common.stage(
    batch_size=32,
    peak_learning_rate=5e-4,
    context_length=64,
    factors=factors,
  )
  c.stage.cpt = common.stage(
    batch_size=32,
    peak_learning_rate=5e-4,
    context_length=64,
    output_length=16,
    factors=factors,
  )
  c.stage.cpt_trained = common.control(
    c.stage.cpt,
    contexts=('none', 'last_k', 'full'),
    factors=(),
    init_from=c.init_from,
  )
  for name, steps in STEPS.items():
    c.stage[name].num_train_steps = steps[preset == 'laptop']
  c.log_every_steps = 5
  c.eval.batch_size = 32
  c.eval.num_windows = 128 if preset == 'laptop' else 512
  c.eval.output_lengths = (4, 16)
  c.eval.reconstruct_lengths = (8, 64)
  return c
