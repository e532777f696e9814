"""The paper's claims at small scale: ablation arms, controls, verdicts.

  launch/run.sh --config=configs/repro.py:cpu --mode=repro --workdir=runs/repro

Every arm is an ordinary run with some values changed, in a workdir of its own
(runs/repro/seed1/main, ...); one may be named: --config.repro.arms=k16. At the
end, and whenever the command is called again, runs/repro/RESULTS.md and
repro.html hold a verdict for each claim of configs/claims.toml, the tables
beside the paper's, and the numbers behind them. Interrupted, the same command
continues; arms from other machines count when their directories are copied in.

The text: books, mathematics in LaTeX and encyclopaedia, mixed in equal shares,
papers only to measure. docs/repro.md says how to get comparable files;
name your own with --config.data.text=A.jsonl.gz,B.jsonl.gz and
--config.eval.data=heldout,C.jsonl.gz.
"""

from configs import common

PRESETS = {
  'smoke': 'two steps a stage on the embedded text, to see that it all runs',
  'cpu': 'bytes, a decoder of 2M, two seeds; the default',
  'gpu': 'sub-words, a decoder of 15M, for one H200; launch/repro_gpu.sh',
}
# docs/bench/repro/RESULTS.md: 55,798 s on a busy machine.
DURATIONS = dict.fromkeys(
  ('', 'cpu'), '15.5 hours of training, counted arm by arm, evals on top'
)
TEXT = (
  'data/books_gutenberg/books.jsonl.gz',
  'data/math_latex/latex.jsonl.gz',
  'data/wikipedia_en/articles.jsonl.gz',
)
UNSEEN_TEXT = 'data/arxiv_papers/papers.jsonl.gz'
K = 8
# Table 8's factors and the sums of its rows; those above s / k are dropped.
TABLE8 = {
  1: 2000, 2: 2000, 4: 2000, 8: 4000, 16: 4000, 32: 4000, 64: 8000, 128: 8000,
}  # fmt: skip
FACTORS = tuple(TABLE8)
# The smaller decoder and the larger encoder, which has the decoder's width.
OTHER_SIZES = {
  'gpu': dict(
    decoder=dict(width=192, mlp_width=576, num_heads=6, num_kv_heads=6),
    encoder=dict(width=256, mlp_width=1024, num_heads=8, num_layers=6),
  ),
  'cpu': dict(
    decoder=dict(width=128, mlp_width=384, num_heads=4, num_kv_heads=4),
    encoder=dict(width=192, mlp_width=384, num_heads=6, num_layers=3),
  ),
  'smoke': dict(
    decoder=dict(width=8, mlp_width=16, num_heads=1),
    encoder=dict(width=16, mlp_width=48, num_heads=2, num_layers=2),
  ),
}


def get_config(preset: str = 'cpu'):
  # s and o, in tokens of the decoder.
  context, output = (512, 128) if preset == 'gpu' else (128, 16)
  c = common.base()
  c.name = f'repro_{preset}'
  c.evals = ('log_perplexity',)
  c.data.text = TEXT
  c.eval.data = ('heldout', UNSEEN_TEXT)
  # At least 20 of the 87 books; the other sources have more documents.
  c.data.heldout_fraction = 0.3
  c.repro.claims = 'configs/claims.toml'
  c.repro.seeds = (2, 3)  # 0 and 1 were pilots (docs/repro.md)

  c.model.chunk_size = K
  c.model.decoder = common.decoder('tiny', vocab_size=264)
  # With 2 key-value heads for 6 it does not copy after 700 steps of `lm`, with
  # 6 it does (docs/repro.md).
  c.model.decoder.update(width=192, mlp_width=576, num_heads=6, num_kv_heads=6)
  c.model.encoder = common.encoder('tiny', vocab_size=264)
  c.model.encoder.mlp_width = 256
  c.model.encoder.max_length = context + 4  # CEPE's and masked-LM's pieces
  c.model.remat = 'dots'  # on a CPU quicker than keeping everything
  c.data.max_encoder_tokens = K + 3  # CLS, SEP and a torn character

  window = dict(context_length=context, output_length=output, batch_size=128)
  c.stage.lm = common.stage(
    num_train_steps=2000,  # copying came at 750 of 1,200, and not far enough
    batch_size=16,
    peak_learning_rate=2e-3,
    output_length=context + output,
    periodic_fraction=0.4,  # design: a frozen decoder must be able to copy
  )
  c.stage.reconstruct = common.stage(
    num_train_steps=260,
    batch_size=128,
    peak_learning_rate=1.5e-3,
    context_length=context,
    factors=FACTORS,
  )
  c.stage.cpt = common.stage(
    num_train_steps=220, peak_learning_rate=1.5e-3, factors=FACTORS, **window
  )
  c.stage.mixed = common.stage(
    num_train_steps=80,
    peak_learning_rate=1e-3,
    expand_fractions=(0.125,),  # the paper's 0.1 of 16 chunks is one: 0.0625
    **window,
  )
  c.stage.grpo = common.stage(
    num_train_steps=60,
    peak_learning_rate=1e-3,
    expand_fractions=(0.0625, 0.125, 0.25),
    num_generations=8,
    clip_eps=0.2,
    updates_per_rollout=2,
    **window | dict(batch_size=32),
  )
  contexts = ('none', 'last_k', 'full')
  c.stage.cpt_trained = common.control(
    c.stage.cpt, contexts=contexts, factors=()
  )
  c.stage.mixed_trained = common.control(c.stage.mixed, contexts=contexts)

  common.cepe(c, piece_length=0)  # its arms set it
  c.stage.cpt_frozen = common.control(c.stage.cpt)
  c.stage.mlm = common.stage(
    num_train_steps=240,
    batch_size=64,
    peak_learning_rate=2e-3,
    context_length=context,
  )

  c.checkpoint_every_seconds = 60.0
  c.eval_every_steps = 50
  c.sample_every_steps = -1

  c.eval.num_windows = 512
  c.eval.output_lengths = (4, 8, 16)
  c.eval.reconstruct_lengths = (32, 64, 128)
  c.eval.expand_fractions = (0.0625, 0.125, 0.25)
  c.eval.tail_chunks = 2
  # To 16 times the window of `lm`, of which 128 is the context.
  c.eval.context_lengths = (32, 64, 128, 256, 512, 1024, 2048)
  if preset == 'smoke':
    _smoke(c)
  if preset == 'gpu':
    _gpu(c)
  _arms(c, **OTHER_SIZES[preset])
  return c


def _arms(c, decoder, encoder):
  """The arms by name; see common.arm."""
  lm = 'init_from=@main/lm'
  arms = c.repro.arm
  context = c.stage.cpt.context_length
  arms.main = common.arm(
    stages=(
      'lm',
      'reconstruct',
      'cpt',
      'mixed',
      'grpo',
      'cpt_trained',
      'mixed_trained',
    ),
    evals=(
      'log_perplexity',
      'reconstruction',
      'selection',
      'copying',
      'context_length',
      'passages',
      'details',
    ),
  )
  # Chunks of another size. Table 13's equal rates: 2 of 16 chunks of 8 bytes
  # expanded are a rate of 4.27, beside the 4 of all chunks of 4 compressed; 2
  # of 32 chunks of 16 sub-words 8.26, beside the 8 of all chunks of 8.
  selective = {16: ('mixed', 'grpo')} if c.name == 'repro_gpu' else {}
  for k in (4, 16, 32):
    arms[f'k{k}'] = common.arm(
      stages=('reconstruct', 'cpt', *selective.get(k, ())),
      changes=(
        f'model.chunk_size={k}',
        f'data.max_encoder_tokens={c.data.max_encoder_tokens - K + k}',
        f'stage.reconstruct.{lm}',
      ),
    )
  # Reconstruction without its curriculum (Table 11): all of s at every step,
  # for as many steps, and for as many tokens.
  steps = c.stage.reconstruct.num_train_steps
  rows = {f: n for f, n in TABLE8.items() if f <= context // K}
  mean = sum(f * n for f, n in rows.items()) / sum(rows.values())
  fewer = round(steps * mean / (context // K))
  for name, num in (('steps', steps), ('tokens', fewer)):
    arms[f'reconstruct_direct_{name}'] = common.arm(
      stages=('reconstruct',),
      evals=('reconstruction',),
      changes=(
        f'stage.reconstruct.{lm}',
        'stage.reconstruct.factors=()',
        f'stage.reconstruct.num_train_steps={num}',
      ),
    )
  # `cpt` without reconstruction (Table 12), given its updates as well; and
  # without the curriculum.
  updates = c.stage.cpt.num_train_steps + steps
  arms.cpt_direct = common.arm(
    stages=('cpt',),
    changes=(f'stage.cpt.{lm}', f'stage.cpt.num_train_steps={updates}'),
  )
  arms.cpt_no_curriculum = common.arm(
    stages=('cpt',),
    changes=(
      'stage.cpt.init_from=@main/reconstruct',
      'stage.cpt.factors=()',
    ),
  )
  # REFRAG with the decoder as it was: what an encoder alone can do.
  arms.frozen = common.arm(
    stages=('cpt_frozen',),
    changes=('stage.cpt_frozen.init_from=@main/reconstruct',),
  )
  # The paper's strongest baseline, by its own recipe; with its decoder frozen
  # and, from the same warm-up, trained as REFRAG's is.
  piece = f'model.piece_length={context}'
  arms.cepe = common.arm(
    stages=('cepe_warmup', 'cepe'),
    changes=(piece, f'stage.cepe_warmup.{lm}'),
  )
  arms.cepe_unfrozen = common.arm(
    stages=('cepe_unfrozen',),
    changes=(piece, 'stage.cepe_unfrozen.init_from=@cepe/cepe_warmup'),
  )
  # Another decoder, another encoder, both (Table 14, Figures 11 and 12).
  small = _changes('model.decoder', decoder)
  large = _changes('model.encoder', encoder)
  arms.small_decoder = common.arm(
    stages=('lm', 'reconstruct', 'cpt', 'cpt_trained'),
    evals=('log_perplexity', 'copying'),
    changes=small,
  )
  arms.large_encoder = common.arm(
    stages=('reconstruct', 'cpt'), changes=(*large, f'stage.reconstruct.{lm}')
  )
  arms.small_decoder_large_encoder = common.arm(
    stages=('reconstruct', 'cpt'),
    changes=(
      *small,
      *large,
      'stage.reconstruct.init_from=@small_decoder/lm',
    ),
  )
  # The policy of the paper's words, which names no positions.
  arms.policy_no_positions = common.arm(
    stages=('grpo',),
    evals=('selection', 'passages'),
    changes=(
      'model.policy.positions=false',
      'stage.grpo.init_from=@main/mixed',
    ),
  )
  # The paper's encoder is pre-trained. Ours starts at random in every other
  # arm; here by masked-LM training, and with the decoder's embeddings (beside
  # `large_encoder`, which has the decoder's width).
  arms.encoder_mlm = common.arm(
    stages=('mlm', 'reconstruct', 'cpt'),
    changes=(f'stage.mlm.{lm}', 'stage.reconstruct.init_from=@encoder_mlm/mlm'),
  )
  arms.encoder_embeddings = common.arm(
    stages=('reconstruct', 'cpt'),
    changes=(
      *large,
      f'stage.reconstruct.{lm}',
      'stage.reconstruct.encoder_init=decoder_embeddings',
    ),
  )


def _changes(section, values):
  return tuple(f'{section}.{name}={value}' for name, value in values.items())


def _gpu(c):
  """Sub-words and larger windows, for one H200.

  No arm has been run whole; docs/bench/h200.md has the steps' times there.
  """
  tokenizer = 'data/tokenizers/llama2'
  c.data.tokenizer = c.data.encoder_tokenizer = tokenizer
  c.model.decoder = common.decoder('small', vocab_size=32_000)
  c.model.decoder.update(mlp_width=1024, num_kv_heads=8)  # to copy, as above
  c.model.encoder = common.encoder('small', vocab_size=32_000)
  c.model.encoder.update(num_heads=8, max_length=600)
  # A chunk is read alone, and its first word may then be cut otherwise.
  c.data.max_encoder_tokens = K + 8
  c.model.compute_dtype = 'bfloat16'
  # No kernel knows the packed rows of `lm`, and blocks take half as long again
  # there (docs/bench/h200.md).
  c.model.update(attention='dense', remat='none')
  c.mesh.update(data=-1)
  steps = dict(
    lm=4000, reconstruct=1500, cpt=1200, mixed=400, grpo=200, mlm=1500
  )
  for name, number in steps.items():
    c.stage[name].num_train_steps = number
  c.stage.lm.batch_size = 64
  for name in ('lm', 'mlm', 'reconstruct', 'cpt', 'mixed'):
    c.stage[name].peak_learning_rate /= 2  # a wider and deeper decoder
  c.eval.output_lengths = (16, 32, 128)
  c.eval.reconstruct_lengths = (32, 128, 512)
  c.eval.context_lengths = (128, 256, 512, 1024, 2048, 4096, 8192)
  c.repro.seeds = (1, 2, 3)


def _smoke(c):
  """Every arm at two steps a stage: for tests and for a first look."""
  c.repro.seeds = (0,)
  c.data.text = ('stdlib',)
  c.data.heldout_fraction = 0.15
  c.eval.data = ('heldout',)
  for size in (c.model.decoder, c.model.encoder, c.model.policy):
    size.update(num_layers=1, num_heads=2, mlp_width=32)
  c.model.decoder.update(width=16, num_kv_heads=1, head_dim=8)
  c.model.encoder.width = 16
  c.model.remat = 'none'
  c.log_every_steps = 1
  for name in c.stage:
    fields = c.stage[name]
    steps = dict(num_train_steps=2, batch_size=8)
    if fields.factors:
      steps['factors'] = (4,)  # one shape: this is mostly compiling
    if fields.expand_fractions:
      steps['expand_fractions'] = (0.125,)
    fields.update(steps)
  c.stage.grpo.num_generations = 4
  c.eval.num_windows = 16
  c.eval.batch_size = 16
  c.eval.output_lengths = (4, 16)
  c.eval.copy_lengths = (32,)
  c.eval.reconstruct_lengths = (32,)
  c.eval.expand_fractions = (0.125,)
  c.eval.context_lengths = (32, 64, 128, 256, 512)
