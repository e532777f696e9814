"""The paper's run: LLaMA-2-7B and RoBERTa-Large on Book and ArXiv.

  launch/run.sh --config=configs/llama2_7b.py:k16 --workdir=runs/llama2_7b_k16

Presets k8, k16 (as without one) and k32 are the paper's three models. Name
your own directories at the end of the line:

  --config.data.tokenizer=DIR --config.data.encoder_tokenizer=DIR
  --config.data.text=ARXIV.jsonl.zst,BOOK.jsonl.zst --config.init_from=DIR

Page and table numbers are those of arXiv 2509.01092v2. What the paper does not
state is marked "ours".
"""

from configs import common

PRESETS = {
  'k8': 'chunks of 8 tokens',
  'k16': 'chunks of 16 tokens',
  'k32': 'chunks of 32 tokens',
}

# p. 5: T = 4096 = s 2048 + o 2048. 20B tokens in windows of 4096 are 5M
# windows, the kinks in Figures 10-12 at 20k, 40k and 59k steps agree, and
# 4 epochs (p. 19) of 5M at batch 256 are 78,125 steps.
CONTEXT_LENGTH = 2048
OUTPUT_LENGTH = 2048
BATCH_SIZE = 256  # p. 19, "for all the experiments"
NUM_STEPS = 4 * 5_000_000 // BATCH_SIZE
# Table 8: 1 to 256 chunks; those above s / k are dropped.
FACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def get_config(preset: str = 'k16'):
  c = common.base()
  k = {'k8': 8, 'k16': 16, 'k32': 32}[preset]
  c.name = f'llama2_7b_{preset}'
  # The run order of p. 4, 16 and 19. The control arms `cpt_trained`,
  # `mixed_trained`, `sft_full` and `sft_none` (ours) are defined below: add
  # them to c.stages to isolate the cost of compression from the benefit of
  # more training.
  c.stages = ('reconstruct', 'cpt', 'mixed', 'grpo', 'sft')
  c.evals = ('log_perplexity', 'reconstruction', 'selection')
  c.log_every_steps = 20
  c.eval_every_steps = 2_000
  c.sample_every_steps = 2_000
  c.checkpoint_every_seconds = 1800.0
  # p. 19: FSDP on 8 nodes of 8 H100. A node's cards share one copy of the
  # parameters and moments (12 bytes a parameter, 11 GB a card), the nodes
  # split the batch.
  c.mesh.update(data=-1, fsdp=8, tensor=1)

  c.model.decoder = common.decoder('llama2_7b', vocab_size=32_000)
  c.model.encoder = common.encoder('roberta_large', vocab_size=50_265)  # p. 16
  c.model.policy.update(num_heads=16, mlp_width=4096)  # ours: the encoder's
  c.model.chunk_size = k
  c.model.compute_dtype = 'bfloat16'  # p. 19
  c.model.remat = 'full'
  c.model.loss_block = 512

  # p. 5: SlimPajama's Book and ArXiv, 50/50.
  c.data.text = ('data/arxiv.jsonl.zst', 'data/book.jsonl.zst')
  c.data.weights = (0.5, 0.5)
  c.data.tokenizer = 'tokenizers/llama2'
  c.data.encoder_tokenizer = 'tokenizers/roberta-large'
  # Ours: k tokens of LLaMA are rarely more than k of RoBERTa; room for the odd
  # formula, and two special tokens.
  c.data.max_encoder_tokens = 2 * k
  c.data.heldout_fraction = 0.01
  # p. 7-8: RAG examples, passages of less than 200 words; lengths are ours.
  c.data.questions = 'data/rag_train.jsonl'
  c.data.num_passages = 8
  c.data.question_length = 128
  c.data.passage_chunks = 320 // k
  c.data.answer_length = 128

  window = dict(context_length=CONTEXT_LENGTH, output_length=OUTPUT_LENGTH)
  c.stage.reconstruct = common.stage(  # p. 18: decoder frozen
    num_train_steps=NUM_STEPS,
    batch_size=BATCH_SIZE,
    peak_learning_rate=2e-4,
    context_length=CONTEXT_LENGTH,
    factors=FACTORS,
  )
  c.stage.cpt = common.stage(  # p. 18-19
    num_train_steps=NUM_STEPS,
    batch_size=BATCH_SIZE,
    peak_learning_rate=5e-5,
    factors=FACTORS,
    **window,
  )
  c.stage.mixed = common.stage(  # p. 16, 19: p = 0.1; steps are ours: an epoch
    num_train_steps=NUM_STEPS // 4,
    batch_size=BATCH_SIZE,
    peak_learning_rate=5e-5,
    expand_fractions=(0.1,),
    **window,
  )
  c.stage.grpo = common.stage(  # p. 17; G, epsilon, rate and steps are ours
    num_train_steps=5_000,
    batch_size=BATCH_SIZE,
    peak_learning_rate=1e-4,
    # Rates of Figure 3, where s = 4096 and T' = 17, 24, 34 and 51 of 256.
    expand_fractions=(17 / 256, 24 / 256, 34 / 256, 51 / 256),
    num_generations=8,
    clip_eps=0.2,
    updates_per_rollout=2,
    **window,
  )
  c.stage.sft = common.stage(  # p. 19: 1.1M examples; one epoch is ours
    num_train_steps=1_100_000 // BATCH_SIZE,
    batch_size=BATCH_SIZE,
    peak_learning_rate=2e-5,
  )
  contexts = ('none', 'last_k', 'full')
  c.stage.cpt_trained = common.control(c.stage.cpt, contexts=contexts)
  c.stage.mixed_trained = common.control(c.stage.mixed, contexts=contexts)
  c.stage.sft_full = common.control(c.stage.sft, contexts=('full',))
  c.stage.sft_none = common.control(c.stage.sft, contexts=('none',))

  c.eval.num_windows = 1_000  # ours; CEPE's number a domain
  c.eval.batch_size = 64
  c.eval.output_lengths = (512, 1024, 2048)  # Table 1
  c.eval.reconstruct_lengths = tuple(  # Table 11; of whole chunks
    n for n in (16, 32, 128, 2048) if n % c.model.chunk_size == 0
  )
  c.eval.expand_fractions = (17 / 256, 24 / 256, 34 / 256, 51 / 256)
  c.eval.tail_chunks = 16
  return c
