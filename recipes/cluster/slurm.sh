#!/usr/bin/env bash
# Any recipe under SLURM; one task per GPU, which is how Lightning counts its processes:
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 recipes/cluster/slurm.sh paper/mmc_vits16_in1k
#   VENV=~/envs/torch sbatch ... recipes/cluster/slurm.sh mmc --trainer.max_steps 1000
#SBATCH --job-name=glpretrain
#SBATCH --cpus-per-task=8
#SBATCH --signal=SIGUSR1@120
#SBATCH --output=slurm-%j.out
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch --nodes n --ntasks-per-node g --gpus-per-node g $0 RECIPE [override ...]" >&2; exit 2; }
recipe=$1; shift
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

exec srun --kill-on-bad-exit "${VENV:-.venv}/bin/python" -m glpretrain.cli pretrain "$recipe" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "$@"
