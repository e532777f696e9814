"""What lies before a run, as soon as it can be known: sizes, passes, time.

Times are rough: closed forms of a step's FLOPs say how the stages compare, and
the first steps of each how fast they go.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from refrag_jax import flops, state
from refrag_jax import session as session_lib
from refrag_jax.config.schema import Config
from refrag_jax.evals import asks_questions
from refrag_jax.runtime.progress import format_count, format_duration, say
from refrag_jax.session import Session
from refrag_jax.stages import STAGES, Stage

MANY_PASSES = 20  # over the same text, from which on it is said in a sentence
FEW_DOCUMENTS = 8  # held out, below which standard errors are rough


def tell(session: Session) -> Callable[[str, float], None]:
  """Says what a run will do, stage by stage.

  Returns:
    What is to be told a stage's name and the seconds that it will take: the
    first time for each stage it says so, and what the stages after it will.
  """
  config, corpus = session.config, session.corpus
  params = session_lib.abstract_params(session)
  rows, notes = [], []
  for name in config.stages:
    stage, cfg = STAGES[name], config.stage[name]
    trained, frozen = stage.partition(params, cfg.freeze)
    passes = stage.task.passes(config, name, corpus)
    rows.append(
      (
        name,
        f'{cfg.num_train_steps:,} steps of {cfg.batch_size}',
        f'{format_count(state.count(trained))} parameters trained',
        f'{format_count(state.count(frozen))} frozen',
        f'{passes:.1f} passes over the text' if passes else '',
      )
    )
    if passes > MANY_PASSES:
      notes.append(
        f'{name} goes {passes:,.0f} times over the same text: bring more, or '
        'take fewer steps, if it is to learn more than that'
      )
  wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = (f'{cell:{width}}' for cell, width in zip(row, wide, strict=True))
    say('  '.join(cells).rstrip())
  for note in [*notes, *_about_data(config, corpus)]:
    say(note)
  return _Clock(config)


def _about_data(config: Config, corpus) -> list[str]:
  """What about the text is better known before than after."""
  notes = []
  heldout = len(corpus.documents('heldout'))
  if heldout < FEW_DOCUMENTS:
    notes.append(
      f'only {heldout} document{"s" * (heldout != 1)} held out: standard '
      'errors are over documents, so they will be rough or missing; bring more '
      'files, split long ones, or raise data.heldout_fraction'
    )
  own = 'stdlib' not in config.data.text
  if own and asks_questions(config) and 'stdlib' in config.data.questions:
    notes.append(
      "data.questions has 'stdlib': these questions are about Python's "
      'standard library, not about your text'
    )
  return notes


class _Clock:
  """Seconds of stages, from FLOPs and from what was measured."""

  def __init__(self, config: Config):
    self._told = set()
    self._flops = {name: rough_flops(config, name) for name in config.stages}

  def __call__(self, name: str, stage_s: float) -> None:
    """Takes note that the steps of a stage will take so long."""
    if name in self._told:
      return
    self._told.add(name)
    text = f'{name}  about {format_duration(stage_s)} for its steps'
    rest = [f for other, f in self._flops.items() if other not in self._told]
    if rest:
      rest_s = sum(rest) * stage_s / max(self._flops[name], 1.0)
      text += f', and {format_duration(rest_s)} for the stages after it'
    say(text)


def rough_flops(config: Config, name: str) -> float:
  """FLOPs of a stage's steps in closed form: three forward passes each."""
  stage, cfg = STAGES[name], config.stage[name]
  counts, times = np.unique(stage.chunks_of_steps(config), return_counts=True)
  per_row = sum(
    number * _forward(config, stage, int(chunks))
    for chunks, number in zip(counts, times, strict=True)
  )
  return 3.0 * cfg.batch_size * per_row * max(cfg.num_generations, 1)


def _forward(config: Config, stage: Stage, chunks: int) -> int:
  """FLOPs of one row's forward pass."""
  decoder, encoder = (
    dataclasses.asdict(part)
    for part in (config.model.decoder, config.model.encoder)
  )
  shapes = {
    field: shape
    for field, (shape, _) in stage.task.row_shapes(
      config, stage.name, chunks
    ).items()
  }
  head = 2 * decoder['width'] * decoder['vocab_size']
  if 'tokens_BT' in shapes:
    (T,) = shapes['tokens_BT']
    return flops.decoder_flops(decoder, T) + head * T
  total = 0
  if 'whole_BM' in shapes:
    total += flops.encoder_flops(encoder, 1, *shapes['whole_BM'])
  total += flops.encoder_flops(encoder, *shapes['encoder_BCM'])
  if 'output_BO' in shapes:
    (O,), (Q,) = shapes['output_BO'], shapes['prefix_BQ']
    cfg, k = config.stage[stage.name], config.model.chunk_size
    T = Q + stage.context.positions(cfg, chunks, k) + O - 1
    total += flops.decoder_flops(decoder, T) + head * O
  return total
