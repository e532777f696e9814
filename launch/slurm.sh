#!/usr/bin/env bash
# sbatch launch/slurm.sh --config=configs/llama2_7b.py --workdir=/shared/runs/7b
# One process a GPU. Edit the next six lines (and add --partition, --account as
# your cluster wants them); workdir, text and this folder on a shared disk.
#SBATCH --job-name=refrag
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=1-00:00:00
# The ranks are told five minutes before the time is up: they save and exit 75.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=refrag-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch: sbatch launch/slurm.sh ARGS}" || exit 2
launch/run.sh --help >/dev/null || exit 2  # .venv once, before the ranks
# All cards of a node are visible to each rank (not --gpus-per-task, which hides
# those that NCCL needs); JAX takes the one of SLURM_LOCALID. When a rank ends,
# the others have ten minutes to end as well. srun does not take the cores of a
# rank from sbatch's line, and would bind it to one (since Slurm 22.05).
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=600 launch/run.sh "$@"
code=$?
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
