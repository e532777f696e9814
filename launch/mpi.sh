#!/usr/bin/env bash
# HOSTS=node1:8,node2:8 launch/mpi.sh --config=... --workdir=/shared/runs/...
# One process a GPU over Open MPI. HOSTS: names and cards of each. Version 5
# needs mpi4py in .venv, version 4 nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
: "${HOSTS:?set HOSTS=node1:8,node2:8}"
launch/run.sh --help >/dev/null || exit 2
# mpirun passes SIGTERM on; the ranks then need time to save.
export OMPI_MCA_odls_base_sigkill_timeout=600 PRTE_MCA_odls_base_sigkill_timeout=600
exec mpirun --host "$HOSTS" --bind-to none launch/run.sh "$@"
