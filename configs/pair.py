"""REFRAG on a pretrained pair: any decoder and encoder of Hugging Face.

  launch/run.sh --config=configs/pair.py:DECODER,ENCODER --workdir=runs/pair

Both are directories or hub names; without them it is SmolLM2-135M with
MiniLM-L6, which nobody has to ask for. Their numbers come from their
config.json, their tokenizers lie beside it, and training starts from their
weights: the first stage is `reconstruct`. As it stands, the budget is that of
a first look on a laptop; the paper's is in configs/llama2_7b.py.

A decoder that cannot copy from its context cannot regenerate it either.
Measure that first (--mode=eval --config.evals=copying): the second copy of a
span should be two nats better than the first. A small decoder that does not
get there learns it in the stage `lm`:

  --config.stages=lm,reconstruct,cpt,cpt_trained
  --config.stage.cpt_trained.init_from=

The smallest, of 260 thousand parameters, regenerates hardly anything while it
is frozen, whether it copies or not. docs/pair.md has the commands that train it
along (`reconstruct_unfrozen`), what that gives and what it costs.
"""

from configs import common

DEFAULT = (
  'HuggingFaceTB/SmolLM2-135M',
  'sentence-transformers/all-MiniLM-L6-v2',
)


def get_config(pair: str = ''):
  c = common.base()
  c.name = 'pair'
  c.stages = ('reconstruct', 'cpt', 'cpt_trained')
  c.evals = ('log_perplexity', 'reconstruction', 'regeneration')
  if pair:
    decoder, _, encoder = pair.partition(',')
    if not (decoder and encoder) or ',' in encoder:
      raise ValueError(
        f'{pair}: name two models, DECODER,ENCODER, each a directory or a name '
        'of the hub'
      )
    c.model.decoder = common.decoder(decoder)
    c.model.encoder = common.encoder(encoder)
  else:
    decoder, encoder = DEFAULT
    c.model.decoder = common.decoder('smollm2_135m', 49_152)
    c.model.encoder = common.encoder('minilm_l6', 30_522)
  c.init_from = f'{decoder},{encoder}'
  c.data.tokenizer, c.data.encoder_tokenizer = decoder, encoder
  c.data.text = ('stdlib',)  # name your own

  c.model.chunk_size = 8
  c.data.max_encoder_tokens = 24
  c.model.policy.update(num_heads=c.model.encoder.num_heads, mlp_width=1024)
  window = dict(context_length=64, output_length=16, batch_size=32)
  c.stage.lm = common.stage(
    num_train_steps=1500,
    batch_size=16,
    peak_learning_rate=1e-3,
    output_length=128,
    periodic_fraction=0.4,
  )
  c.stage.reconstruct = common.stage(
    num_train_steps=200,
    batch_size=32,
    peak_learning_rate=5e-4,
    context_length=64,
    factors=(1, 2, 4, 8),
  )
  c.stage.reconstruct_unfrozen = common.control(c.stage.reconstruct)
  c.stage.cpt = common.stage(
    num_train_steps=100,
    peak_learning_rate=2e-4,
    factors=(1, 2, 4, 8),
    **window,
  )
  contexts = ('none', 'last_k', 'full')
  c.stage.cpt_trained = common.control(
    c.stage.cpt, contexts=contexts, factors=(), init_from=c.init_from
  )
  c.eval_every_steps = 25
  c.eval.num_windows = 256
  c.eval.output_lengths = (4, 16)
  c.eval.reconstruct_lengths = (8, 16, 64)
  return c
