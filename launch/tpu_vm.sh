#!/usr/bin/env bash
# launch/tpu_vm.sh create | run ARGS | delete
# A TPU slice as a queued resource; `run` starts the same line on all its hosts,
# again while they answer 75 (stopped, the state saved). Workdir and text on a
# disk that all hosts have mounted (Filestore, gcsfuse).
set -uo pipefail
# Edit, or set in the environment:
NAME=${NAME:-refrag} ZONE=${ZONE:-us-east5-a} TYPE=${TYPE:-v5p-128}
VERSION=${VERSION:-v2-alpha-tpuv5} REPOSITORY=${REPOSITORY:-}
gcloud_tpu() { gcloud compute tpus "$@" --zone="$ZONE"; }
everywhere() { gcloud_tpu tpu-vm ssh "$NAME" --worker=all --command="$1"; }
case ${1:-} in
  create)
    : "${REPOSITORY:?set REPOSITORY to the URL to clone this project from}"
    gcloud_tpu queued-resources create "$NAME" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot || exit
    while :; do
      state=$(gcloud_tpu queued-resources describe "$NAME" --format='value(state.state)')
      case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDED | DELETING) echo "$NAME: $state" >&2; exit 1 ;;
      esac
      sleep 30
    done
    # Ubuntu 22.04, as on these images, comes with Python 3.10.
    everywhere "sudo apt-get -qq update; \
      sudo apt-get -qq install -y python3.11 python3.11-venv; \
      git clone '$REPOSITORY' refrag_jax"
    ;;
  run)
    shift
    printf -v line ' %q' "$@"
    code=75
    while [ "$code" -eq 75 ]; do
      everywhere "cd refrag_jax && launch/run.sh$line"
      code=$?
    done
    exit "$code"
    ;;
  delete) gcloud_tpu queued-resources delete "$NAME" --force --quiet ;;
  *) echo 'launch/tpu_vm.sh create | run ARGS | delete' >&2; exit 2 ;;
esac
