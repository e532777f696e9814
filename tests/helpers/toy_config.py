"""A config of toy sizes with every stage, and its text and questions.

  python -m refrag_jax.main --config=tests/helpers/toy_config.py:FOLDER

Every number that a golden value depends on stands here, not in configs/.
"""

import json
import os

import numpy as np

from configs import common

WORDS = [
  'chunk',
  'encoder',
  'policy',
  'reward',
  'context',
  'token',
  'expand',
  'vector',
  'window',
  'answer',
  'question',
  'passage',
  'decoder',
  'batch',
  'expects',
  'returns',
  'keeps',
  'nothing',
]


def get_config(preset: str = ''):
  """Four steps a stage; `preset` is the folder of `write_data`."""
  c = common.base()
  c.name = 'toy_run'
  c.stages = ('lm', 'reconstruct', 'cpt', 'mixed', 'grpo', 'sft')
  c.stages += ('cpt_trained', 'mixed_trained', 'sft_full', 'sft_none')
  c.evals = ()
  c.log_every_steps = 1
  c.checkpoint_every_seconds = 1e9  # a busy machine saves no more often
  small = dict(num_layers=1, num_heads=2, mlp_width=32)
  for size in (c.model.decoder, c.model.encoder, c.model.policy):
    size.update(small)
  c.model.decoder.update(width=16, num_kv_heads=1, head_dim=8)
  c.model.encoder.update(width=16, max_length=8)
  c.model.chunk_size = 4
  c.data.max_encoder_tokens = 6
  c.data.heldout_fraction = 0.25
  if preset:
    c.data.text = (os.path.join(preset, 'text.jsonl'),)
    c.data.questions = (os.path.join(preset, 'questions.jsonl'),)
    c.data.cache_dir = os.path.join(preset, 'cache')
  c.data.num_passages = 2
  c.data.passage_chunks = 4
  c.data.question_length = 20
  c.data.answer_length = 12

  steps = dict(num_train_steps=4, batch_size=8)
  window = dict(context_length=16, output_length=6)
  c.stage.lm = common.stage(
    **steps, peak_learning_rate=3e-3, output_length=24, periodic_fraction=0.25
  )
  c.stage.mlm = common.stage(
    **steps, peak_learning_rate=2e-3, context_length=16, factors=(1, 4)
  )
  c.stage.reconstruct = common.stage(
    **steps, peak_learning_rate=2e-3, context_length=16, factors=(1, 4)
  )
  c.stage.cpt = common.stage(
    **steps, **window, peak_learning_rate=1e-3, factors=(2, 4)
  )
  c.stage.mixed = common.stage(
    **steps, **window, peak_learning_rate=1e-3, expand_fractions=(0.25,)
  )
  c.stage.grpo = common.stage(
    **steps,
    **window,
    peak_learning_rate=1e-2,
    expand_fractions=(0.25, 0.5),
    num_generations=4,
    clip_eps=0.2,
    updates_per_rollout=2,
  )
  c.stage.sft = common.stage(**steps, peak_learning_rate=1e-3)
  contexts = ('none', 'last_k', 'full')
  c.stage.cpt_trained = common.control(c.stage.cpt, contexts=contexts)
  c.stage.mixed_trained = common.control(c.stage.mixed, contexts=contexts)
  c.stage.reconstruct_unfrozen = common.control(c.stage.reconstruct)
  c.stage.cpt_frozen = common.control(c.stage.cpt)
  c.stage.sft_full = common.control(c.stage.sft, contexts=('full',))
  c.stage.sft_none = common.control(c.stage.sft, contexts=('none',))
  # Not in c.stages: who runs them sets model.piece_length.
  common.cepe(c, piece_length=0)

  c.eval.num_windows = c.eval.context_windows = 16
  c.eval.batch_size = 8
  c.eval.output_lengths = (3, 6)
  c.eval.reconstruct_lengths = (4, 16)
  c.eval.expand_fractions = (0.25, 0.5)
  c.eval.tail_chunks = 1
  c.eval.num_questions = 8
  c.eval.copy_lengths = (4, 8)
  c.eval.context_lengths = (8, 32)
  c.eval.num_passages = 2
  return c


def write_data(folder) -> str:
  """Text and questions that never change; returns the folder."""
  rng = np.random.default_rng(0)
  words = lambda n: ' '.join(rng.choice(WORDS, n))
  with open(os.path.join(folder, 'text.jsonl'), 'w') as f:
    for number in range(60):
      text = f'Document {number}: {words(30)}.'
      f.write(json.dumps({'text': text}) + '\n')
  with open(os.path.join(folder, 'questions.jsonl'), 'w') as f:
    for number in range(40):
      texts = [words(2) for _ in range(3)]
      ctxs = [
        {'title': f't{i}', 'text': text, 'gold': i == number % 3}
        for i, text in enumerate(texts)
      ]
      record = {
        'question': f'{number}: {texts[number % 3].split()[0]}',
        'answers': [texts[number % 3].split()[1][:7]],
        'ctxs': ctxs,
      }
      f.write(json.dumps(record) + '\n')
  return str(folder)
