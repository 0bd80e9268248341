#!/usr/bin/env bash
# One machine or several, any recipe. On one machine:
#   GPUS=8 recipes/cluster/torchrun.sh mmc --trainer.max_steps 1000
# On two machines, the same line on each:
#   NODES=2 GPUS=8 RENDEZVOUS=first-machine:29500 recipes/cluster/torchrun.sh paper/mmc_vits16_in1k
# VENV=path uses another environment than .venv.
# The recipe's batch_size is per process, and so is its learning rate for all of them together: look at both.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: [GPUS=n] [NODES=n RENDEZVOUS=host:port] $0 RECIPE [override ...]" >&2; exit 2; }
recipe=$1; shift
GPUS=${GPUS:-1} NODES=${NODES:-1}

if [ "$NODES" -gt 1 ]; then
  meeting=(--rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:?host:port of the first machine}" --rdzv-id "${RDZV_ID:-glpretrain}")
else
  meeting=(--standalone)
fi
exec "${VENV:-.venv}/bin/python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS" "${meeting[@]}" \
  -m glpretrain.cli pretrain "$recipe" \
  --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.strategy ddp "$@"
