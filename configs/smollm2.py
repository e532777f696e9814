"""A real pair: SmolLM2-135M-Instruct and MiniLM-L6, adapters on the decoder.

  launch/models.sh                                 # once: both, into models/
  launch/run.sh --config=configs/smollm2.py:laptop --workdir=runs/smollm2
  launch/smollm2_gpu.sh                            # on a card, in pieces

The decoder comes from llama.cpp's file of it, 4 bits a weight, and stays as it
is: `reconstruct` trains encoder and projection, every later stage those and
adapters of rank 16 (LoRA), and so do the control arms. Name your own text in
--config.data.text and questions in --config.data.questions; without them, they
are the interpreter's documentation and about it.
"""

from configs import common

PRESETS = {
  'laptop': 'a first look, on two CPU cores',
  'cpu': 'contexts of 32 tokens, on two CPU cores',
  'k4': 'as without a preset, 4 tokens a chunk',
  'k16': 'as without a preset, 16 tokens a chunk',
}
DURATIONS = {
  '': 'some hours on one card of 80 GB, by estimate',
  'laptop': 'an hour on two CPU cores, by estimate',
  'cpu': 'an hour on two CPU cores',
  'k4': 'some hours on one card of 80 GB, by estimate',
  'k16': 'some hours on one card of 80 GB, by estimate',
}
DECODER = 'models/SmolLM2-135M-Instruct.Q4_1.gguf'
ENCODER = 'models/all-MiniLM-L6-v2'
# stage: (steps, batch) on a card, of an hour, of the laptop's look; a control
# arm follows the stage that it mirrors.
BUDGETS = {
  'reconstruct': ((4000, 256), (500, 32), (300, 32)),
  'cpt': ((4000, 256), (300, 32), (60, 32)),
  'mixed': ((1000, 256), (150, 32), (40, 32)),
  'grpo': ((500, 64), (60, 16), (10, 16)),
  'sft': ((2000, 128), (200, 16), (30, 8)),
}
# Tokens of contexts and of outputs, there as well.
LENGTHS = ((512, 128), (32, 16), (16, 16))


def get_config(preset: str = ''):
  c = common.base()
  c.name = 'smollm2'
  place = {'cpu': 1, 'laptop': 2}.get(preset, 0)
  on_card = place == 0
  c.stages = (
    'reconstruct', 'cpt', 'mixed', 'grpo', 'sft',
    'cpt_trained', 'mixed_trained', 'sft_full', 'sft_none',
  )  # fmt: skip
  c.evals = ('log_perplexity', 'reconstruction', 'regeneration')
  if preset == 'cpu':
    c.stages = ('reconstruct', 'cpt', 'cpt_trained')
  elif preset == 'laptop':
    # A chunk or two is too little to choose from.
    c.stages = tuple(name for name in c.stages if name != 'grpo')
  else:
    c.evals = (*c.evals, 'qa', 'selection', 'passages')
  # Numbers that are known need no file, so that --mode=config lists them.
  c.model.decoder = common.decoder('smollm2_135m', 49_152)
  c.model.encoder = common.encoder('minilm_l6', 30_522)
  c.init_from = f'{DECODER},{ENCODER}'
  c.data.tokenizer, c.data.encoder_tokenizer = DECODER, ENCODER
  c.model.lora.rank = 16
  c.model.policy.update(num_heads=c.model.encoder.num_heads, mlp_width=1024)
  c.model.attention = 'fused'
  if on_card:
    c.model.update(compute_dtype='bfloat16', remat='dots', loss_block=64)
  k = {'k4': 4, 'k16': 16}.get(preset, 8)
  c.model.chunk_size = k
  c.data.max_encoder_tokens = 2 * k + 8

  # What an instruct model expects: a user who shows texts, then asks.
  c.data.chat = True
  c.data.question_template = 'Answer a question from these texts.\n\n'
  c.data.passage_template = '{title}\n{text}\n\n'
  c.data.answer_template = 'Question: {question}\nAnswer in a few words.'
  c.data.num_passages = 5 if on_card else 1
  c.data.passage_chunks = 192 // k  # 100 words and a title fit
  c.data.question_length = 96
  c.data.answer_length = 32

  context_length, output_length = LENGTHS[place]
  factors = tuple(2**i for i in range(10) if 2**i <= context_length // k)
  window = dict(context_length=context_length, output_length=output_length)
  c.stage.reconstruct = common.stage(
    peak_learning_rate=5e-4, context_length=context_length, factors=factors
  )
  c.stage.cpt = common.stage(peak_learning_rate=5e-4, factors=factors, **window)
  # 0.1, the paper's share, of the few chunks of a CPU's contexts is none.
  fractions = (0.1, 0.25) if on_card else (0.5,)
  c.stage.mixed = common.stage(
    peak_learning_rate=2e-4,
    expand_fractions=fractions,
    **window,
  )
  c.stage.grpo = common.stage(
    peak_learning_rate=3e-4,
    expand_fractions=fractions,
    num_generations=8,
    clip_eps=0.2,
    updates_per_rollout=2,
    **window,
  )
  c.stage.sft = common.stage(peak_learning_rate=2e-4)
  contexts = ('none', 'last_k', 'full')
  if preset == 'cpu':  # a third of the time: what REFRAG has to beat
    contexts = ('none',)
  c.stage.cpt_trained = common.control(
    c.stage.cpt, contexts=contexts, factors=(), init_from=c.init_from
  )
  c.stage.mixed_trained = common.control(c.stage.mixed, contexts=contexts)
  c.stage.sft_full = common.control(c.stage.sft, contexts=('full',))
  c.stage.sft_none = common.control(c.stage.sft, contexts=('none',))
  # Half of the encoder: the rest of what is trained is 38 MB in bfloat16, by
  # the sizes of its arrays.
  if on_card:
    for name in ('reconstruct', 'cpt', 'mixed', 'sft'):
      c.stage[name].freeze = r'^encoder/(word|position)_embeddings'
  for name, budgets in BUDGETS.items():
    steps, batch_size = budgets[place]
    c.stage[name].num_train_steps = steps
    c.stage[name].batch_size = batch_size

  c.log_every_steps = 5
  c.eval.batch_size = 32
  c.eval.num_windows = {'laptop': 128, 'cpu': 256}.get(preset, 512)
  c.eval.output_lengths = (4, output_length)
  c.eval.reconstruct_lengths = (k, context_length)
  c.eval.expand_fractions = fractions
  c.eval.question_fractions = fractions if on_card else ()
  c.eval.question_passages = (1, 10, 20) if on_card else ()
  c.eval.num_questions = 256 if on_card else 64
  c.eval.selectors = ('rl', 'ppl_desc', 'random', 'oracle')
  return c
