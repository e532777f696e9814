#!/usr/bin/env bash
# launch/smollm2_gpu.sh ARGS: a piece of the training of SmolLM2 and MiniLM on
# one card, 9 minutes of it; exit code 75: not done yet, call again. Text and
# questions are files under data/ (see below); checkpoints stay in the workdir
# between the pieces. Not run on a card yet.
#
# PIECE_SECONDS: length of a piece. PRESET: '' (8 tokens a chunk), k4 or k16.
# ARGS such as --config.stage.cpt.distill_weight=1 with another --workdir.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
[ -e models/all-MiniLM-L6-v2 ] || launch/models.sh
name=smollm2${PRESET:+_$PRESET}
files=$(printf '%s,' data/questions/*.jsonl.gz)
exec timeout --preserve-status -s TERM "${PIECE_SECONDS:-540}" launch/run.sh \
  --config="configs/smollm2.py${PRESET:+:$PRESET}" --workdir="runs/$name" \
  --config.data.text="$(printf '%s,' data/text/*.jsonl.gz | sed 's/,$//')" \
  --config.data.questions="${files%,}" "$@"
