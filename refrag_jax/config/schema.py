"""The frozen dataclasses that every module below `main` is written against.

A config file yields an ml-collections ConfigDict; `load.build` turns it into
these, once, and refuses what cannot work before anything is allocated. Below
this border nothing knows ml-collections or flags.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A Llama-type decoder (paper section 2: LLaMA-2-7B, unchanged).

  With what its relatives add: biases (Qwen2), norms on queries and keys
  (Qwen3), a sliding window (Mistral), stretched rotary positions (Llama 3.1).
  """

  vocab_size: int
  num_layers: int
  width: int
  mlp_width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  # Llama 3.1: rotations slower than low_freq_factor turns in
  # original_length positions are slowed by factor, those faster than
  # high_freq_factor turns are left alone, a ramp between. factor 1: as it is.
  rope_factor: float
  rope_low_freq_factor: float
  rope_high_freq_factor: float
  rope_original_length: int
  norm_eps: float
  tie_embeddings: bool
  qkv_bias: bool
  qk_norm: bool  # RMSNorm over each head's query and key, before the rotation
  sliding_window: int  # positions a token sees, itself included; 0: all
  max_length: int  # positions that the model has; 0: any number


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """A bidirectional encoder (paper: RoBERTa-Large)."""

  kind: str  # 'bert': RoBERTa and relatives, or 'modernbert'
  vocab_size: int
  num_layers: int
  width: int
  mlp_width: int
  num_heads: int
  max_length: int  # positions, special tokens included
  position_offset: int  # of position 0: RoBERTa pad_id + 1 = 2, BERT 0
  # 'modernbert' only: every global_every-th layer from the first on sees all,
  # the others local_window tokens to each side, with rotations of their own.
  global_every: int
  local_window: int
  rope_theta: float
  local_rope_theta: float
  norm_eps: float
  pooling: str  # 'cls' (first position) or 'mean' over real tokens


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """The chunk-expansion policy g_theta (paper A.1: two transformer layers)."""

  num_layers: int
  num_heads: int
  mlp_width: int
  positions: bool  # rotary positions over the chunk index
  rope_theta: float
  norm_eps: float


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Adapters of the decoder's projections, trained in its place."""

  rank: int  # 0: none, the decoder itself is trained
  alpha: float  # their sum is scaled by alpha / rank
  dropout: float  # share of their inputs that is 0 in a training step
  targets: tuple[str, ...]  # of LORA_TARGETS in check.py


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  decoder: DecoderConfig
  encoder: EncoderConfig
  policy: PolicyConfig
  lora: LoraConfig
  chunk_size: int  # k, in decoder tokens
  piece_length: int  # what CEPE's encoder reads at once; 0: no CEPE in this run
  compute_dtype: str  # 'float32' or 'bfloat16'; parameters are always float32
  attention: str  # the decoder's; models/attention.py says which there are
  remat: str  # 'none', 'dots' or 'full': what a layer keeps for its backward
  scan_layers: bool  # one compiled layer in a loop, or each on its own
  loss_block: int  # targets of a row whose logits exist at once; 0: all


@dataclasses.dataclass(frozen=True)
class DataConfig:
  text: tuple[str, ...]  # sources; see data/text/sources.py
  weights: tuple[float, ...]  # mixture weights, one a source; (): equal shares
  tokenizer: str  # 'bytes' or a Hugging Face tokenizer directory
  encoder_tokenizer: str
  max_encoder_tokens: int  # a chunk's encoder tokens, special tokens included
  heldout_fraction: float  # of documents, by content hash
  cache_dir: str  # '' means <workdir>/data
  questions: tuple[str, ...]  # 'stdlib', or files; data/questions/forms.py
  question_weights: tuple[float, ...]  # one a file; (): equal shares
  chat: bool  # in the model's own chat template: what a user says
  # Before the passages, and between them and the answer; either may hold
  # '{question}'.
  question_template: str
  passage_template: str  # '{title}' and '{text}'
  answer_template: str
  num_passages: int  # passages a question brings
  question_length: int  # decoder tokens, caps for the static shapes
  passage_chunks: int
  history_chunks: int  # of a conversation; 0: it is tokens of the question
  answer_length: int  # with what the template gives before it


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One training stage's budget and task. Unused fields are 0 or ()."""

  num_train_steps: int
  batch_size: int  # sequences a step, over all devices
  accumulation_steps: int
  peak_learning_rate: float
  context_length: int  # s, decoder tokens
  output_length: int  # o; for `lm` the window
  factors: tuple[int, ...]  # curriculum factors (chunks); () = always s / k
  expand_fractions: tuple[float, ...]  # p of `mixed` and `grpo`
  contexts: tuple[str, ...]  # control arms: 'none', 'last_k', 'full'
  num_generations: int  # G of GRPO
  clip_eps: float
  updates_per_rollout: int
  periodic_fraction: float  # share of `lm` windows that repeat a span
  init_from: str  # '' = the stage's predecessor in this workdir
  freeze: str  # regex of parameter paths that stay as they are, besides
  # Weight of the KL from the decoder with the context as tokens; 0: none.
  distill_weight: float
  distill_temperature: float
  encoder_init: str  # of a fresh encoder: '' = random, or 'decoder_embeddings'


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, clipping and the schedule of a stage's learning rate."""

  betas: tuple[float, ...]  # decay of the two moments
  eps: float
  clip_norm: float  # of the gradients of all trained parameters together
  weight_decay: float  # times the learning rate, of kernels and embeddings
  warmup_fraction: float  # of the steps, linear from 0
  schedule: str  # 'cosine' or 'linear' down to 0 after that, or 'constant'


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  data: tuple[str, ...]  # texts; () or 'heldout': the held-out data.text
  num_windows: int  # held-out windows a data set
  batch_size: int
  output_lengths: tuple[int, ...]  # the o of P<o>
  reconstruct_lengths: tuple[int, ...]  # the n of P<n>
  expand_fractions: tuple[float, ...]
  selectors: tuple[str, ...]
  tail_chunks: int  # tail chunks expanded in every row of selection's 2nd table
  questions: tuple[str, ...]  # files; () or 'heldout': of data.questions
  num_questions: int  # of each file
  question_rows: tuple[str, ...]  # of the eval qa; (): all
  question_passages: tuple[int, ...]  # other numbers of them to try; (): none
  question_fractions: tuple[float, ...]  # p of answers with chunks expanded
  copy_lengths: tuple[int, ...]  # tokens of the spans of `copying`
  context_lengths: tuple[int, ...]  # the s of `context_length`; (): skip it
  context_windows: int  # held-out windows of `context_length`
  num_passages: int  # in a context of `passages`, one of them useful; 0: skip


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1, what the others leave."""

  data: int
  fsdp: int
  tensor: int
  sequence: int


ANY_DEVICES = MeshConfig(data=-1, fsdp=1, tensor=1, sequence=1)


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
  join_seconds: int  # that processes wait for each other at the start
  heartbeat_seconds: int  # after which a silent process is given up
  xla_flags: tuple[str, ...]  # for NVIDIA's cards; configs/xla_flags.py
  libtpu_flags: tuple[str, ...]
  hang_seconds: float  # that one phase may take unwatched; 0: any (watchdog.py)


@dataclasses.dataclass(frozen=True)
class ArmConfig:
  """An arm of an ablation: the config that holds it, with these values."""

  stages: tuple[str, ...]
  evals: tuple[str, ...]
  changes: tuple[str, ...]  # 'a.b=value', as after --config. on a command line


@dataclasses.dataclass(frozen=True)
class ReproConfig:
  arms: tuple[str, ...]  # the arms to run, of `arm`; () = all
  seeds: tuple[int, ...]
  claims: str  # TOML file of the claims and their tests, fixed before the runs
  arm: dict[str, ArmConfig]


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """What --mode=bench measures: all of these with each other."""

  contexts: tuple[int, ...]  # tokens of context
  chunk_sizes: tuple[int, ...]  # k; (): the model's own
  fractions: tuple[float, ...]  # p, shares of chunks that stay tokens
  batches: tuple[int, ...]  # requests at once; 0: as many as fit
  question_tokens: int
  output_tokens: int  # written by each request, whatever they are
  repeats: int  # of each cell, with fresh prompts
  transformers: bool  # the same decoder in transformers' torch beside it
  # A .gguf file that llama.cpp reads beside it; '': none. What came in later
  # has a default, so that configs saved before, beside checkpoints, are read.
  llama_cpp: str = ''


@dataclasses.dataclass(frozen=True)
class Config:
  name: str
  seed: int
  stages: tuple[str, ...]  # run order, control arms included
  evals: tuple[str, ...]  # of EVALS in evals/__init__.py
  # eval: the checkpoint or export; train: the start of the first stage, which
  # may also be Hugging Face models (hf/sources.py).
  init_from: str
  log_every_steps: int
  eval_every_steps: int
  checkpoint_every_steps: int
  checkpoint_every_seconds: float
  sample_every_steps: int  # 0: at the end of a stage only; -1: never
  checkpoints_to_keep: int  # newest ones of a stage, besides its best
  profile_steps: tuple[int, ...]  # first and last step to trace; (): none
  tensorboard: bool
  wandb: str  # project of Weights & Biases; '': none
  optimizer: OptimizerConfig
  mesh: MeshConfig
  cluster: ClusterConfig
  model: ModelConfig
  data: DataConfig
  stage: dict[str, StageConfig]
  eval: EvalConfig
  bench: BenchConfig
  repro: ReproConfig


def expanded_chunks(fraction: float, num_chunks: int) -> int:
  """T' = floor(p L) (paper A.1; Table 13's odd rates fix the rounding).

  The small term undoes the rounding of p itself: 0.29 * 100 is 28.999...
  """
  return int(fraction * num_chunks + 1e-9)


def context_chunks(stage: StageConfig, chunk_size: int) -> tuple[int, ...]:
  """The chunk counts L that a stage trains at: its factors that fit s / k."""
  limit = stage.context_length // chunk_size
  return tuple(f for f in stage.factors if f <= limit) or (limit,)


def piece_tokens(config: Config) -> int:
  """Room for a CEPE piece in encoder tokens, special tokens included.

  For the text of as many chunks, but no more than the encoder reads.
  """
  chunks = -(-config.model.piece_length // config.model.chunk_size)
  room = chunks * (config.data.max_encoder_tokens - 2) + 2
  return min(room, config.model.encoder.max_length)
