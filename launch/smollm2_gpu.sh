#!/usr/bin/env bash
# launch/smollm2_gpu.sh ARGS: a piece of the training of SmolLM2 and MiniLM on
# one card, 9 minutes of it; exit code 75: not done yet, call again. Checkpoints
# stay in the workdir between the pieces; when all is done, OUT has what was
# trained (38 MB by the sizes of its arrays). Not run on a card yet.
#
# Text is data/text/*.jsonl.gz, questions are data/questions/*.jsonl.gz.
# PIECE_SECONDS: length of a piece. PRESET: nothing (8 tokens a chunk), k4 or
# k16. OUT: a new directory. ARGS such as --config.stage.cpt.distill_weight=1.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
[ -e models/all-MiniLM-L6-v2 ] || launch/models.sh || exit 1
name=smollm2${PRESET:+_$PRESET}
list() {
  local files
  files=$(printf '%s,' "$@")
  echo "${files%,}"
}
config=(--config="configs/smollm2.py${PRESET:+:$PRESET}"
  --config.data.text="$(list data/text/*.jsonl.gz)"
  --config.data.questions="$(list data/questions/*.jsonl.gz)"
  # With the policy in it, one checkpoint is all.
  --config.stage.sft.init_from="@$name/grpo" "$@")
out=${OUT:-runs/${name}_changes}
if [ -e "$out" ]; then
  echo "$out is there: all is done"
  exit
fi
timeout --preserve-status -s TERM "${PIECE_SECONDS:-540}" \
  launch/run.sh "${config[@]}" --workdir="runs/$name" || exit
launch/run.sh "${config[@]}" --mode=export --changes \
  --from="runs/$name/checkpoints/sft" --to="$out"
