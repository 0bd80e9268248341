#!/usr/bin/env bash
# One machine or several, any recipe. On one machine:
#   GPUS=8 recipes/cluster/torchrun.sh mmc --trainer.max_steps 1000
# On two machines, the same line on each:
#   NODES=2 GPUS=8 RENDEZVOUS=first-machine:29500 recipes/cluster/torchrun.sh paper/mmc_vits16_in1k
# VENV=path uses another environment than .venv. The recipe says whether parameters are sharded (trainer.strategy: fsdp2) or each GPU holds
# all of them (ddp, Lightning's choice for several). A process that ends is started again with all others, RESTARTS times, and the run goes on.
# The recipe's batch_size is per process; its learning rate is used as it stands, or follows the joint batch where it has `per`.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: [GPUS=n] [NODES=n RENDEZVOUS=host:port] $0 RECIPE [override ...]" >&2; exit 2; }
recipe=$1; shift
GPUS=${GPUS:-1} NODES=${NODES:-1}
python=${VENV:-.venv}/bin/python
[ -x "$python" ] || { echo "$0: $python is not there: give VENV=path of an environment" >&2; exit 2; }

if [ "$NODES" -gt 1 ]; then
  meeting=(--rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:?is not set: give host:port of the first machine}" --rdzv-id "${RDZV_ID:-glpretrain}")
else
  meeting=(--standalone)
fi
exec "$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "${RESTARTS:-0}" "${meeting[@]}" \
  -m glpretrain.cli pretrain "$recipe" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" "$@"
