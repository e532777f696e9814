"""My decoder, my encoder, my text: copy this file and change three lines.

  launch/run.sh --config=configs/mine.py --workdir=runs/mine

As it stands it trains a 5-million-parameter decoder from nothing on the
documentation that ships with Python: 89 hours on two CPU cores, so the work of
an accelerator. The three lines to change are marked (1), (2) and (3); below
them stand the budgets. See first that it all runs, with toy models:

  launch/run.sh --config=configs/mine.py:smoke --workdir=runs/mine_smoke

`--mode=data` shows what the model will read, and every value can be tried
without editing:

  launch/run.sh --config=configs/mine.py --config.stage.lm.num_train_steps=100
"""

from configs import common

# (1) My decoder: a size of common.DECODERS, then 'bytes' or the directory of a
# Hugging Face tokenizer, then that tokenizer's vocabulary size.
DECODER = ('small', 'bytes', 264)
# (2) My encoder: a size of common.ENCODERS, its tokenizer, its vocabulary size.
ENCODER = ('small', 'bytes', 264)
# (3) My text: files, directories or tfds names; .txt, .jsonl[.gz|.zst] with a
# "text" field, parquet, ArrayRecord. Several are mixed in equal shares.
TEXT = ('stdlib',)

PRESETS = {'smoke': 'two steps a stage of a toy model, to see that it all runs'}
DURATIONS = {
  '': '89 hours on two CPU cores',
  'smoke': '80 seconds on two idle CPU cores',
}


def get_config(preset: str = ''):
  c = common.base()
  c.name = 'mine'
  c.stages = (
    'lm',  # leave it out when init_from brings a trained decoder
    'reconstruct',
    'cpt',
    'mixed',
    'grpo',
    'cpt_trained',
    'mixed_trained',
  )
  c.evals = ('log_perplexity', 'reconstruction', 'selection')
  c.checkpoint_every_seconds = 600.0

  size, c.data.tokenizer, vocab_size = DECODER
  c.model.decoder = common.decoder(size, vocab_size)
  size, c.data.encoder_tokenizer, vocab_size = ENCODER
  c.model.encoder = common.encoder(size, vocab_size)
  c.data.text = TEXT

  # Tokens of the decoder in a chunk (k), and what its text may be in tokens
  # of the encoder, special ones included.
  c.model.chunk_size = 16
  c.data.max_encoder_tokens = 32
  c.model.policy.update(num_heads=8, mlp_width=1024)
  c.model.remat = 'dots'

  # 16 chunks are read, 64 tokens predicted from them.
  window = dict(context_length=256, output_length=64)
  c.stage.lm = common.stage(
    num_train_steps=10_000,
    batch_size=64,
    peak_learning_rate=1e-3,
    output_length=512,
    periodic_fraction=0.4,
  )
  c.stage.reconstruct = common.stage(
    num_train_steps=5_000,
    batch_size=128,
    peak_learning_rate=1e-3,
    context_length=256,
    factors=(1, 2, 4, 8, 16),
  )
  c.stage.cpt = common.stage(
    num_train_steps=5_000,
    batch_size=128,
    peak_learning_rate=5e-4,
    factors=(1, 2, 4, 8, 16),
    **window,
  )
  c.stage.mixed = common.stage(
    num_train_steps=2_000,
    batch_size=128,
    peak_learning_rate=5e-4,
    expand_fractions=(0.125,),
    **window,
  )
  c.stage.grpo = common.stage(
    num_train_steps=1_000,
    batch_size=64,
    peak_learning_rate=5e-4,
    expand_fractions=(0.0625, 0.125, 0.25),
    num_generations=8,
    clip_eps=0.2,
    updates_per_rollout=2,
    **window,
  )
  contexts = ('none', 'last_k', 'full')
  c.stage.cpt_trained = common.control(c.stage.cpt, contexts=contexts)
  c.stage.mixed_trained = common.control(c.stage.mixed, contexts=contexts)

  c.eval.output_lengths = (16, 64)
  c.eval.reconstruct_lengths = (16, 64, 256)
  c.eval.expand_fractions = (0.0625, 0.125, 0.25)
  c.eval.tail_chunks = 2

  if preset == 'smoke':
    _smoke(c)
  return c


def _smoke(c):
  """Two steps a stage, 16 wide, on your text, cut as it will be."""
  c.name = 'mine_smoke'
  for size in (c.model.decoder, c.model.encoder, c.model.policy):
    size.update(num_layers=1, num_heads=2, mlp_width=32)
  c.model.decoder.update(width=16, num_kv_heads=1, head_dim=8)
  c.model.encoder.width = 16
  c.log_every_steps = 1
  for name in ('lm', 'reconstruct', 'cpt', 'mixed', 'grpo'):
    # The control arms follow the stage that they repeat.
    c.stage[name].num_train_steps = 2
    c.stage[name].batch_size = 8
  c.stage.grpo.num_generations = 4
  c.eval.num_windows = 8
  c.eval.batch_size = 8
