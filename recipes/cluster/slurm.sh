#!/usr/bin/env bash
# Any recipe under SLURM; one task per GPU, which is how Lightning counts its processes:
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 recipes/cluster/slurm.sh paper/mmc_vits16_in1k
#   VENV=~/envs/torch sbatch ... recipes/cluster/slurm.sh mmc --trainer.max_steps 1000
# The recipe says whether parameters are sharded (trainer.strategy: fsdp2) or each GPU holds all of them (ddp, Lightning's choice for several).
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
cd "${SLURM_SUBMIT_DIR:?is not set: start this with sbatch}"
: "${SLURM_NNODES:?is not set: give sbatch --nodes n}"
: "${SLURM_NTASKS_PER_NODE:?is not set: give sbatch --ntasks-per-node g, one task per GPU}"
: "${SLURM_CPUS_PER_TASK:?is not set: give sbatch --cpus-per-task c}"
python=${VENV:-.venv}/bin/python
[ -x "$python" ] || { echo "$0: $python is not there: give VENV=path of an environment that every node sees" >&2; exit 2; }

# srun does not take the number of cores over from sbatch.
status=0
srun --kill-on-bad-exit --cpus-per-task "$SLURM_CPUS_PER_TASK" "$python" -m glpretrain.cli pretrain "$recipe" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" "$@" || status=$?
[ "$status" -ne 75 ] || exec scontrol requeue "$SLURM_JOB_ID"  # 75: ended by a signal, with a checkpoint
exit "$status"
