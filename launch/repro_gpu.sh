#!/usr/bin/env bash
# launch/repro_gpu.sh ARGS: a piece of the ablations on one H200, 9 minutes of
# it; exit code 75: not done yet, call again. The text is 35 MB of compressed
# files under data/ (docs/repro.md); checkpoints stay in the workdir between the
# pieces. No arm has been run whole; docs/bench/h200.md has the times of steps.
#
# PIECE_SECONDS: length of a piece. ARGS such as --config.repro.seeds=1.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec timeout --preserve-status -s TERM "${PIECE_SECONDS:-540}" launch/run.sh \
  --config=configs/repro.py:gpu --mode=repro --workdir=runs/repro_gpu "$@"
