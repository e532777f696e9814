"""What a stage is: what it reads, what it trains, and its loss.

Everything that tells one stage from another is in its object: the loop, the
checks, the samples and the planner ask it, and nobody asks for its name.
"""

import dataclasses
import re
from collections.abc import Callable

import jax

from refrag_jax.config import check
from refrag_jax.config.schema import Config, StageConfig
from refrag_jax.data.tasks.task import Sampler, Task, stream_seed
from refrag_jax.data.text.corpus import Corpus
from refrag_jax.errors import UserError
from refrag_jax.models import losses
from refrag_jax.stages.context import CHUNKS, Nothing
from refrag_jax.state import partition

ENCODER_INIT = 'decoder_embeddings'


def as_is(model, params, batch, keys_B, variant, cfg):
  """The `prepare` of stages whose batch is what the host made."""
  del model, params, keys_B, variant, cfg
  return batch


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """One training stage; the loop in train.py runs any of them.

  Whatever `prepare` draws belongs to a row and its key: pieces of a batch draw
  what the whole of it would.
  """

  name: str
  predecessor: str | None  # the stage whose checkpoint it starts from
  trainable: str  # regex on parameter paths; the rest is frozen
  task: Task  # what it reads
  # (model, params, batch, variant) -> nll, mask: of each target, any shape
  nll: Callable
  context: Nothing = CHUNKS  # how the decoder is given the context
  # The stage whose very samples it reads, in the same order: control arms.
  mirrors: str = ''
  prepare: Callable = as_is  # (model, params, batch, keys_B, variant, cfg)
  measures: str = 'loss'  # what `evaluate` returns: 'loss' or 'reward'
  # (model, params, batch, c_BCE) -> score_BC: whose best are expanded in
  # samples; None: the first ones.
  score: Callable | None = None

  def loss(self, model, params, batch, variant, cfg: StageConfig):
    """(sum over targets, their number, metrics): accumulation adds them."""
    del cfg
    return *losses.masked_sum(*self.nll(model, params, batch, variant)), {}

  def evaluate(
    self, model, params, batch, keys_B, variant, cfg: StageConfig
  ) -> jax.Array:
    """The measure of each row on a batch as the host made it, (B,)."""
    batch = self.prepare(model, params, batch, keys_B, variant, cfg)
    return losses.masked_mean(*self.nll(model, params, batch, variant))

  def partition(self, params: dict, freeze: str = '') -> tuple[dict, dict]:
    """(trainable, frozen) parameters; absent leaves are None.

    `freeze`, of the stage's config, is a regex of paths that stay as they are.

    Where there are adapters, they are trained in the decoder's place.
    """
    if 'lora' in params and self.trains_adapters:
      freeze = f'{freeze}|^decoder/' if freeze else '^decoder/'
    return partition(params, self.trainable, freeze)

  def lora_dropout(self, config: Config) -> float:
    """Dropout of the adapters that it trains; 0 where it trains none."""
    of = config.model.lora
    return of.dropout if of.rank and self.trains_adapters else 0.0

  @property
  def trains_adapters(self) -> bool:
    """Whether it trains those that there are, in the decoder's place."""
    return bool(re.search(self.trainable, 'lora/'))

  def seed(self, config: Config) -> int:
    """The seed of its stream of samples, that of the stage it mirrors."""
    return stream_seed(config, self.mirrors or self.name)

  def sampler(self, config: Config, corpus: Corpus) -> Sampler:
    """(step, rows) -> those rows of that step's training batch."""
    return self.task.sampler(config, self.name, self.seed(config), corpus)

  def chunks_of_steps(self, config: Config):
    """The number of chunks of every step, int (num_train_steps,)."""
    return self.task.chunks_of_steps(config, self.name, self.seed(config))

  def check(self, config: Config) -> None:
    """Refuses a section that cannot work, before anything is allocated."""
    cfg, prefix = config.stage[self.name], f'stage.{self.name}.'
    check.positive(
      cfg,
      prefix,
      'num_train_steps',
      'batch_size',
      'accumulation_steps',
      'peak_learning_rate',
    )
    if cfg.batch_size % cfg.accumulation_steps != 0:
      raise UserError(
        f'config.{prefix}batch_size {cfg.batch_size} is not a multiple of '
        f'accumulation_steps {cfg.accumulation_steps}: the parts of a step '
        'have equal size'
      )
    try:
      re.compile(cfg.freeze)
    except re.error as e:
      raise UserError(
        f'config.{prefix}freeze {cfg.freeze!r} is no regular expression: {e}'
      ) from None
    self.task.check(config, self.name)
    self.context.check(config, self.name)
    _check_encoder_init(cfg, prefix, config)
    self.check_updates(cfg, prefix)
    self.check_distillation(cfg, prefix)
    self.check_positions(config)

  def check_updates(self, cfg: StageConfig, prefix: str) -> None:
    """Refuses updates on a rollout: only `grpo` has rollouts."""
    if cfg.updates_per_rollout > 1:
      raise UserError(
        f'config.{prefix}updates_per_rollout is {cfg.updates_per_rollout}: '
        f'rollouts are of grpo alone, and {self.name} makes one update a step; '
        'use 0'
      )

  def check_distillation(self, cfg: StageConfig, prefix: str) -> None:
    """Refuses distillation where it is of no use; a control arm ignores it."""
    if cfg.distill_weight and not self.mirrors:
      raise UserError(
        f'config.{prefix}distill_weight is {cfg.distill_weight:g}: of cpt, '
        f'mixed and sft there is a teacher, and {self.name} has none; use 0'
      )

  def check_positions(self, config: Config) -> None:
    """Refuses a sequence beyond the positions that a decoder was made with."""
    limit, longest = config.model.decoder.max_length, self.longest(config)
    if 0 < limit < longest:
      raise UserError(
        f'config.stage.{self.name} makes sequences of up to {longest} '
        f'positions, and the decoder has {limit} '
        '(config.model.decoder.max_length): shorten context_length, '
        'output_length or what questions bring'
      )

  def longest(self, config: Config) -> int:
    """Positions of the decoder's longest sequence; 0 where it reads nothing.

    The last token of an output is predicted and not read
    (splice.num_positions).
    """
    cfg, k = config.stage[self.name], config.model.chunk_size
    chunks = self.task.num_chunks(config, self.name)
    shapes = self.task.row_shapes(config, self.name, chunks)
    if 'tokens_BT' in shapes:
      return shapes['tokens_BT'][0][0]
    if 'output_BO' not in shapes:
      return 0
    (prefix,), (output,) = shapes['prefix_BQ'][0], shapes['output_BO'][0]
    return prefix + self.context.positions(cfg, chunks, k) + output - 1


def _check_encoder_init(
  stage: StageConfig, prefix: str, config: Config
) -> None:
  key, start = f'config.{prefix}encoder_init', stage.encoder_init
  if start not in ('', ENCODER_INIT):
    raise UserError(
      f"{key}: there is no {start!r}; use '' for random or {ENCODER_INIT!r}"
    )
  decoder, encoder = config.model.decoder, config.model.encoder
  of_decoder = decoder.width, decoder.vocab_size, config.data.tokenizer
  of_encoder = encoder.width, encoder.vocab_size, config.data.encoder_tokenizer
  if start == ENCODER_INIT and of_decoder != of_encoder:
    raise UserError(
      f'{key}: {start!r} needs equal width, vocab_size and tokenizer, but the '
      f'decoder has {of_decoder} and the encoder {of_encoder}: make them equal '
      "or use ''"
    )
