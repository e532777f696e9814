"""What the config files share: defaults, model sizes and control arms.

This file is not run; a config file starts from it:

  from configs import common

  def get_config(preset: str = ''):
    c = common.base()
    ...

Every field is defined in `refrag_jax/config/schema.py`; the fields of a stage
are explained here, once, in `stage`.
"""

import ml_collections

# Paper section 2 (LLaMA-2-7B) and its ablations (13B, 3.1-8B, 3.2-3B), by their
# config.json; SmolLM2 is the small one that nobody has to ask for. `tiny` and
# `small` train from nothing, on a laptop and on one accelerator.
DECODERS = {
  'tiny': dict(
    num_layers=4,
    width=128,
    mlp_width=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
  ),
  'small': dict(
    num_layers=6,
    width=256,
    mlp_width=768,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
  ),
  'llama2_7b': dict(
    num_layers=32,
    width=4096,
    mlp_width=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_length=4096,
  ),
  'llama2_13b': dict(
    num_layers=40,
    width=5120,
    mlp_width=13824,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_length=4096,
  ),
  'llama31_8b': dict(
    num_layers=32,
    width=4096,
    mlp_width=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    rope_factor=8.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_length=8192,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_length=131_072,
  ),
  'llama32_3b': dict(
    num_layers=28,
    width=3072,
    mlp_width=8192,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    rope_factor=32.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_length=8192,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_length=131_072,
  ),
  'smollm2_135m': dict(
    num_layers=30,
    width=576,
    mlp_width=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_length=8192,
  ),
}

# RoBERTa counts positions from 2 and takes 512 tokens, specials included.
ENCODERS = {
  'tiny': dict(
    num_layers=2,
    width=128,
    mlp_width=512,
    num_heads=4,
    max_length=64,
    position_offset=0,
    norm_eps=1e-5,
    pooling='cls',
  ),
  'small': dict(
    num_layers=3,
    width=256,
    mlp_width=1024,
    num_heads=8,
    max_length=128,
    position_offset=0,
    norm_eps=1e-5,
    pooling='cls',
  ),
  'roberta_base': dict(
    num_layers=12,
    width=768,
    mlp_width=3072,
    num_heads=12,
    max_length=512,
    position_offset=2,
    norm_eps=1e-5,
    pooling='cls',
  ),
  'roberta_large': dict(
    num_layers=24,
    width=1024,
    mlp_width=4096,
    num_heads=16,
    max_length=512,
    position_offset=2,
    norm_eps=1e-5,
    pooling='cls',
  ),
  'bge_small': dict(
    num_layers=12,
    width=384,
    mlp_width=1536,
    num_heads=12,
    max_length=512,
    position_offset=0,
    norm_eps=1e-12,
    pooling='cls',
  ),
  'minilm_l6': dict(
    num_layers=6,
    width=384,
    mlp_width=1536,
    num_heads=12,
    max_length=512,
    position_offset=0,
    norm_eps=1e-12,
    pooling='mean',
  ),
}


# What Llama-2 does not have, and a model from scratch does not need.
PLAIN_DECODER = dict(
  rope_factor=1.0,
  rope_low_freq_factor=1.0,
  rope_high_freq_factor=4.0,
  rope_original_length=0,
  qkv_bias=False,
  qk_norm=False,
  sliding_window=0,
  max_length=0,
)
BERT = dict(
  kind='bert',
  global_every=0,
  local_window=0,
  rope_theta=0.0,
  local_rope_theta=0.0,
)


def base() -> ml_collections.ConfigDict:
  """A config without stages: what a file does not set stays as it is here."""
  c = ml_collections.ConfigDict()
  c.name = 'unnamed'
  c.seed = 0
  c.stages = ()
  c.evals = ('log_perplexity', 'reconstruction', 'selection')
  c.init_from = ''
  c.log_every_steps = 20
  c.eval_every_steps = 0  # 0: at the start and the end of a stage only
  c.checkpoint_every_steps = 0  # 0: by time only, and at the end of a stage
  c.checkpoint_every_seconds = 300.0
  c.sample_every_steps = 0  # 0: at the end of a stage only; -1: never
  c.checkpoints_to_keep = 1  # newest ones of a stage; its best one stays, too
  # (first, last): steps of every stage that JAX's profiler traces, for XProf.
  c.profile_steps = ()
  c.tensorboard = False
  c.wandb = ''  # a project of Weights & Biases

  # Paper B.2: AdamW, 4 % linear warm-up, cosine. It does not state the others;
  # they are those of princeton-nlp/CEPE, which it says that it follows.
  c.optimizer = ml_collections.ConfigDict(
    dict(
      betas=(0.9, 0.999),
      eps=1e-8,
      clip_norm=1.0,
      weight_decay=0.0,
      warmup_fraction=0.04,
      schedule='cosine',
    )
  )

  c.mesh = ml_collections.ConfigDict(
    dict(data=-1, fsdp=1, tensor=1, sequence=1)
  )

  c.cluster = ml_collections.ConfigDict(
    # JAX waits 300 seconds: a cold start of many hosts takes longer.
    dict(
      join_seconds=1200,
      heartbeat_seconds=30,
      hang_seconds=1200.0,
      xla_flags=(),
      libtpu_flags=(),
    )
  )

  c.model = ml_collections.ConfigDict()
  c.model.decoder = decoder('tiny', vocab_size=264)
  c.model.encoder = encoder('tiny', vocab_size=264)
  # Paper A.1: two transformer layers over the c_i; sizes are not stated.
  c.model.policy = ml_collections.ConfigDict(
    dict(
      num_layers=2,
      num_heads=4,
      mlp_width=512,
      positions=True,
      rope_theta=10_000.0,
      norm_eps=1e-5,
    )
  )
  # Usual numbers, for where a rank is given: 0 trains the decoder itself.
  c.model.lora = ml_collections.ConfigDict(
    dict(
      rank=0,
      alpha=32.0,
      dropout=0.0,
      targets=(
        'q_proj', 'k_proj', 'v_proj', 'o_proj',
        'gate_proj', 'up_proj', 'down_proj',
      ),
    )
  )  # fmt: skip
  c.model.chunk_size = 8
  c.model.piece_length = 0  # see `cepe`
  c.model.compute_dtype = 'float32'
  c.model.attention = 'dense'
  c.model.remat = 'none'
  c.model.scan_layers = True
  c.model.loss_block = 0

  c.data = ml_collections.ConfigDict()
  c.data.text = ('stdlib',)
  c.data.weights = ()
  c.data.tokenizer = 'bytes'
  c.data.encoder_tokenizer = 'bytes'
  c.data.max_encoder_tokens = 16
  c.data.heldout_fraction = 0.1
  c.data.cache_dir = ''
  c.data.questions = ('stdlib',)
  c.data.question_weights = ()
  c.data.chat = False
  # Question first, then the passages, then the answer (paper Figure 1). The
  # paper prints no template; this is RA-DIT's in the paper's order.
  c.data.question_template = 'Q: {question}\n'
  c.data.passage_template = '{title}.{text}\n'
  c.data.answer_template = 'A: '
  c.data.num_passages = 4
  # Of the embedded questions, in bytes: 85 the longest question with BOS, 128
  # the longest passage, 9 of 10 answers with prompt and EOS within 27.
  c.data.question_length = 88
  c.data.passage_chunks = 16
  c.data.history_chunks = 0
  c.data.answer_length = 40

  c.stage = ml_collections.ConfigDict()

  c.eval = ml_collections.ConfigDict()
  c.eval.data = ()
  c.eval.num_windows = 512
  c.eval.batch_size = 64
  c.eval.output_lengths = (16,)
  c.eval.reconstruct_lengths = (8,)
  c.eval.expand_fractions = (0.25,)
  c.eval.selectors = ('rl', 'ppl_desc', 'ppl_asc', 'random', 'last', 'oracle')
  c.eval.tail_chunks = 0
  c.eval.questions = ()
  c.eval.num_questions = 256
  c.eval.question_rows = ()
  c.eval.question_passages = ()
  c.eval.question_fractions = ()
  c.eval.copy_lengths = (16, 32)
  c.eval.context_lengths = ()
  c.eval.context_windows = 128  # they are long
  c.eval.num_passages = 4

  # Latency (--mode=bench).
  c.bench = ml_collections.ConfigDict(
    dict(
      contexts=(512, 2048),
      chunk_sizes=(),
      fractions=(0.0, 0.1),
      batches=(1,),
      question_tokens=32,
      output_tokens=16,
      repeats=5,
      transformers=False,
      llama_cpp='',
    )
  )

  # Ablations (--mode=repro): arms by name, see `arm` and configs/repro.py.
  c.repro = ml_collections.ConfigDict()
  c.repro.arms = ()  # (): all of them
  c.repro.seeds = (0,)
  c.repro.claims = ''
  c.repro.arm = ml_collections.ConfigDict()
  return c


def cepe(c: ml_collections.ConfigDict, piece_length: int) -> None:
  """Gives a config the stages of the baseline CEPE (paper section 4).

  They repeat the windows, budgets and learning rates of `reconstruct` and
  `cpt`; name them in c.stages to run them. `cepe` is CEPE itself, its decoder
  frozen; `cepe_unfrozen` trains the decoder as well.

  Args:
    c: with the stages `reconstruct` and `cpt`.
    piece_length: decoder tokens that the encoder reads at once. Must divide
      s, and leave room for two special tokens in the encoder's positions.
  """
  c.model.piece_length = piece_length
  c.stage.cepe_warmup = control(c.stage.reconstruct, factors=())
  c.stage.cepe = control(c.stage.cpt, factors=())
  c.stage.cepe_unfrozen = control(c.stage.cpt, factors=())


def arm(stages=(), evals=(), changes=()) -> ml_collections.ConfigDict:
  """An arm of an ablation: this config with some values changed.

  Args:
    stages: what the arm trains in a workdir of its own. A stage's
      `init_from='@main/lm'` starts from the stage `lm` of the arm `main`.
    evals: what it measures; () takes the config's.
    changes: such as 'model.chunk_size=16', as after --config. when typed.
  """
  return ml_collections.ConfigDict(
    dict(stages=stages, evals=evals, changes=changes)
  )


def decoder(size: str, vocab_size: int = 0) -> ml_collections.ConfigDict:
  """A decoder's numbers.

  Args:
    size: of DECODERS; or the directory or hub name of a Hugging Face model,
      whose config.json then says everything (name it in c.init_from as well).
    vocab_size: its tokenizer's, 264 for 'bytes'; 0 takes config.json's.
  """
  if size in DECODERS:
    numbers = PLAIN_DECODER | DECODERS[size]
  else:
    numbers = _hugging_face(size, 'decoder')
  vocab_size = vocab_size or numbers['vocab_size']
  return ml_collections.ConfigDict(numbers | dict(vocab_size=vocab_size))


def encoder(size: str, vocab_size: int = 0) -> ml_collections.ConfigDict:
  """An encoder's numbers; as `decoder`, with ENCODERS."""
  if size in ENCODERS:
    numbers = BERT | ENCODERS[size]
  else:
    numbers = _hugging_face(size, 'encoder')
  vocab_size = vocab_size or numbers['vocab_size']
  return ml_collections.ConfigDict(numbers | dict(vocab_size=vocab_size))


def _hugging_face(name: str, group: str) -> dict:
  """The numbers of a model by its config.json."""
  # The one import beside ml_collections, for configs that name such a model:
  # what a config.json means is known there.
  from refrag_jax.hf import families

  return families.numbers(name, group)


def stage(**fields) -> ml_collections.ConfigDict:
  """A stage's budget and task; what a stage does not use keeps 0 or ()."""
  c = ml_collections.ConfigDict()
  c.num_train_steps = 0
  # Sequences a step, over all devices; for `grpo` contexts, each with its
  # num_generations rollouts.
  c.batch_size = 0
  # Parts that a step's batch is computed in, one after the other, where it
  # does not fit into memory at once; the result is that of one whole batch.
  c.accumulation_steps = 1
  # AdamW's, after the warm-up (paper p. 19); config.optimizer has the rest.
  c.peak_learning_rate = 0.0
  # s: decoder tokens that are read as chunks. Must be a multiple of k. `mlm`
  # reads them whole as well, as far as encoder.max_length reaches.
  c.context_length = 0
  # o: decoder tokens that are predicted after them; for `lm` the window.
  c.output_length = 0
  # Curriculum factors (chunks) that Table 8's weights are laid over, those
  # above s / k being dropped; (): every sequence has s / k chunks.
  c.factors = ()
  # p: shares of the chunks that stay tokens. One of them is drawn per step,
  # and floor(p L) must not be 0.
  c.expand_fractions = ()
  # What a control arm's decoder reads in place of the chunk embeddings:
  # 'none', 'last_k' (as many last tokens as there are chunks) or 'full'; with
  # several, one decoder is trained on an equal mixture.
  c.contexts = ()
  # G: rollouts of one context that an advantage compares (paper eq. 1).
  c.num_generations = 0
  # epsilon: probability ratios are clipped to 1 -+ this (paper eq. 1).
  c.clip_eps = 0.0
  # Optimizer steps on one set of rollouts; with 1 the clip never acts.
  c.updates_per_rollout = 0
  # Share of `lm` windows that repeat a span, from which a decoder trained
  # from nothing learns to copy: `reconstruct` needs that of a frozen one.
  c.periodic_fraction = 0.0
  # The stage's starting point; '': its predecessor's checkpoint in the same
  # workdir; '@RUN/STAGE': a stage's in the workdir RUN beside this one.
  c.init_from = ''
  # A regular expression of parameter paths that stay as they are, on top of
  # what the stage freezes: '^decoder/embed_tokens', '^decoder/'.
  c.freeze = ''
  # Distillation: the weight, beside the NLL's 1, of the KL divergence from what
  # the same decoder says with the context as tokens; and the temperature of
  # both distributions.
  c.distill_weight = 0.0
  c.distill_temperature = 1.0
  # How a fresh encoder starts where this stage is the first to need it: '' at
  # random, 'decoder_embeddings' with the decoder's as its word embeddings
  # (for equal widths and tokenizers).
  c.encoder_init = ''
  c.update(fields)
  return c


def control(
  of: ml_collections.ConfigDict, **fields
) -> ml_collections.ConfigDict:
  """A control arm of another stage: its budget follows that stage's.

  The fields are lazy references, so that an override such as
  --config.stage.cpt.num_train_steps=10 shortens `cpt_trained` as well and the
  two stay comparable.

  Args:
    of: the stage whose windows, order and learning rate the arm repeats.
    **fields: what differs.

  Returns:
    The arm's stage.
  """
  c = ml_collections.ConfigDict()
  for name in of:
    if name in fields:
      c[name] = fields[name]
    else:
      c[name] = of.get_oneway_ref(name)
  return c
