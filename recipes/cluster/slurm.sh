#!/usr/bin/env bash
# Any recipe under SLURM; one task per GPU, which is how Lightning counts its processes:
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 recipes/cluster/slurm.sh paper/mmc_vits16_in1k
#   VENV=~/envs/torch sbatch ... recipes/cluster/slurm.sh mmc --trainer.max_steps 1000
# A job that ran out of time goes on with --ckpt_path runs/<recipe>/<time>/checkpoints/last.ckpt. No --signal here: Lightning would
# requeue the job, and the new start, which gets a folder of its own, would not find what the old one had saved.
#SBATCH --job-name=glpretrain
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.out
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch --nodes n --ntasks-per-node g --gpus-per-node g $0 RECIPE [override ...]" >&2; exit 2; }
recipe=$1; shift
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

# srun does not take the number of cores over from sbatch.
exec srun --kill-on-bad-exit --cpus-per-task "$SLURM_CPUS_PER_TASK" "${VENV:-.venv}/bin/python" -m glpretrain.cli pretrain "$recipe" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "$@"
