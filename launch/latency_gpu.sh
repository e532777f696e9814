#!/usr/bin/env bash
# launch/latency_gpu.sh ARGS: how soon Llama-2-7B's shape answers on one card of
# 80 GB: random weights in bfloat16, one request at a time as in the paper
# (Figure 2), no question but BOS, k = 16 and 32; then as many requests as fit.
# Results: bench.json and bench.html under runs/latency_gpu. Not run on a card
# yet.
#
# ARGS such as --config.bench.contexts=4096,16384.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec launch/run.sh --mode=bench --config=configs/llama2_7b.py \
  --workdir=runs/latency_gpu \
  --config.data.text=stdlib --config.data.weights=1.0 \
  --config.data.tokenizer=bytes --config.data.encoder_tokenizer=bytes \
  --config.mesh.fsdp=1 --config.model.decoder.max_length=0 \
  --config.bench.contexts=16384 --config.bench.chunk_sizes=16,32 \
  --config.bench.fractions=0.0 --config.bench.batches=1,0 \
  --config.bench.question_tokens=1 --config.bench.repeats=3 "$@"
