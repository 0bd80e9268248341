#!/usr/bin/env bash
# Any recipe under SLURM; one task per GPU, which is how Lightning counts its processes:
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 recipes/cluster/slurm.sh paper/mmc_vits16_in1k
#   VENV=~/envs/torch sbatch ... recipes/cluster/slurm.sh mmc --trainer.max_steps 1000
# Two minutes before its time is up, and when it is preempted, the job saves its state, goes back into the queue, and goes on with the same run.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --job-name=glpretrain
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.out
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch --nodes n --ntasks-per-node g --gpus-per-node g $0 RECIPE [override ...]" >&2; exit 2; }
recipe=$1; shift
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

# srun does not take the number of cores over from sbatch.
status=0
srun --kill-on-bad-exit --cpus-per-task "$SLURM_CPUS_PER_TASK" "${VENV:-.venv}/bin/python" -m glpretrain.cli pretrain "$recipe" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "$@" || status=$?
[ "$status" -ne 75 ] || exec scontrol requeue "$SLURM_JOB_ID"  # 75: ended by a signal, with a checkpoint
exit "$status"
