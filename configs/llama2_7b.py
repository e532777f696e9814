"""The paper's run: LLaMA-2-7B and RoBERTa-Large on Book and ArXiv.

  launch/run.sh --config=configs/llama2_7b.py:k16 --workdir=runs/llama2_7b_k16

Presets k8, k16 (as without one) and k32 are the paper's three models, the
others its ablations and two pairs of ours, with k = 16. Name your directories
at the end of the line, DECODER and ENCODER being Hugging Face models:

  --config.init_from=DECODER,ENCODER
  --config.data.tokenizer=DECODER --config.data.encoder_tokenizer=ENCODER
  --config.data.text=ARXIV.jsonl.zst,BOOK.jsonl.zst

Page and table numbers are those of arXiv 2509.01092v2. What the paper does not
state is marked "ours".
"""

from configs import common, xla_flags

PRESETS = {
  'k8': 'chunks of 8 tokens',
  'k16': 'chunks of 16 tokens',
  'k32': 'chunks of 32 tokens',
  'roberta_base': 'the smaller encoder (Figures 11 and 12)',
  'llama2_13b': 'LLaMA-2-13B (Figure 11)',
  'llama31_8b': 'LLaMA-3.1-8B (Table 14)',
  'llama32_3b': 'LLaMA-3.2-3B (Table 14)',
  'llama32_3b_bge_small': 'LLaMA-3.2-3B and BGE-small',
  'smollm2_135m': 'SmolLM2-135M and MiniLM-L6: ungated, the one to start with',
}
K = {'k8': 8, 'k32': 32}  # the others: 16
# preset: decoder and encoder, where they are not the main run's
PAIRS = {
  'roberta_base': ('llama2_7b', 'roberta_base'),
  'llama2_13b': ('llama2_13b', 'roberta_large'),
  'llama31_8b': ('llama31_8b', 'roberta_large'),
  'llama32_3b': ('llama32_3b', 'roberta_large'),
  'llama32_3b_bge_small': ('llama32_3b', 'bge_small'),
  'smollm2_135m': ('smollm2_135m', 'minilm_l6'),
}
# Of the models' tokenizers.
VOCAB = {
  'llama2_7b': 32_000,
  'llama2_13b': 32_000,
  'llama31_8b': 128_256,
  'llama32_3b': 128_256,
  'smollm2_135m': 49_152,
  'roberta_large': 50_265,
  'roberta_base': 50_265,
  'bge_small': 30_522,
  'minilm_l6': 30_522,
}

# p. 7-8: the data sets of fine-tuning that the paper names, of four of its "5
# domains": dialogue, open-domain questions, reading comprehension, chains of
# thought. A file each, in the DPR form with passages of a retriever.
QUESTIONS = (
  'oasst',
  'commonsense_qa', 'math_qa', 'web_questions', 'wiki_qa', 'yahoo_answers',
  'freebase_qa', 'ms_marco',
  'drop', 'pubmed_qa', 'quarel', 'squad_v2',
  'aqua_rat', 'ecqa', 'gsm8k', 'strategy_qa',
)  # fmt: skip

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
  k = K.get(preset, 16)
  decoder, encoder = PAIRS.get(preset, ('llama2_7b', 'roberta_large'))
  c.name = preset if preset in PAIRS else f'llama2_7b_{preset}'
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
  c.cluster.update(xla_flags=xla_flags.H100, libtpu_flags=xla_flags.TPU)

  c.model.decoder = common.decoder(decoder, VOCAB[decoder])
  c.model.encoder = common.encoder(encoder, VOCAB[encoder])  # p. 16
  c.model.policy.update(  # ours: the encoder's
    num_heads=c.model.encoder.num_heads, mlp_width=c.model.encoder.mlp_width
  )
  c.model.chunk_size = k
  c.model.compute_dtype = 'bfloat16'  # p. 19
  c.model.attention = 'fused'
  c.model.remat = 'full'
  c.model.loss_block = 512

  # p. 5: SlimPajama's Book and ArXiv, 50/50.
  c.data.text = ('data/arxiv.jsonl.zst', 'data/book.jsonl.zst')
  c.data.weights = (0.5, 0.5)
  c.data.tokenizer = f'models/{decoder}'
  c.data.encoder_tokenizer = f'models/{encoder}'
  # Ours: k tokens of LLaMA are rarely more than k of RoBERTa; room for the odd
  # formula, and two special tokens.
  c.data.max_encoder_tokens = 2 * k
  c.data.heldout_fraction = 0.01
  # p. 7-8: passages of less than 200 words; lengths are ours, and so are the
  # equal shares (1.1 million examples in all, nothing is said of each).
  c.data.questions = tuple(f'data/rag/{name}.jsonl' for name in QUESTIONS)
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
