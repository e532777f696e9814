#!/usr/bin/env bash
# launch/repro_gpu.sh ARGS: a piece of the ablations on one H200, 9 minutes of
# it; exit code 75: not done yet, call again. The text is 35 MB of compressed
# files under data/ (docs/repro.md); checkpoints stay in the workdir between the
# pieces.
#
# Measured on an H200 (jax 0.11.2), the longest step of each stage: `lm` 50 ms,
# `cpt` 40, `mixed` 45, `grpo` 19; a program compiles in 7 to 20 s. From that,
# all arms of a seed are some 28 minutes of steps; no arm has been run whole.
#
# PIECE_SECONDS: length of a piece. ARGS such as --config.repro.seeds=1.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec timeout --preserve-status -s TERM "${PIECE_SECONDS:-540}" launch/run.sh \
  --config=configs/repro.py:gpu --mode=repro --workdir=runs/repro_gpu "$@"
