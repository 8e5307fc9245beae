#!/usr/bin/env bash
# A training on one or several machines without a scheduler, that begins again by itself when a process or a machine is lost.
# From the project's folder, the same line on each machine:
#
#   NODES=2 GPUS=8 ADDRESS=10.0.0.1:29400 RUN=first configs/cluster/torchrun.sh \
#       fit --config configs/lm/wikitext103.yaml --config configs/trainer/ddp.yaml        (fsdp2.yaml: a model shared out)
#
# or: make train-nodes NODES=2 GPUS=8 ADDRESS=10.0.0.1:29400 NAME=first CONFIG=configs/lm/wikitext103.yaml. What follows the
# script is what follows `python -m revdeq_lightning`. The project's folder, or run.folder at least, must lie on a file
# system that the machines share.
#
#   RUN             names the run: its folder and its W&B run; the same RUN later goes on from its newest checkpoint
#   GPUS            of each machine: one process for each (on a CPU: processes)
#   NODES           machines; 1 if not given
#   ADDRESS         HOST:PORT of one of them, where they meet; needed from two machines on. PORT is any free one
#   LOCAL_ADDRESS   how the others reach this machine; needed where its name says it wrongly
#   MAX_RESTARTS    how often processes that fail are started again; 3 if not given
set -euo pipefail

run=${RUN:?RUN=NAME names the run, the same on every machine}
gpus=${GPUS:?GPUS=N: how many GPUS (on a CPU: processes) each machine has}
nodes=${NODES:-1}
address=${ADDRESS:-localhost:0}
local_address=${LOCAL_ADDRESS:-}
python=${PYTHON:-.venv/bin/python}
if [ "$nodes" -gt 1 ] && [ -z "${ADDRESS:-}" ]; then
    echo "error: ADDRESS=HOST:PORT of one of the $nodes machines, where they meet" >&2
    exit 2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # seconds to save after SIGTERM, Ctrl-C
# Each start with a store of its own: in one that is shared, whoever comes first reads the addresses of the processes before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
here=()
if [ -n "$local_address" ]; then
    is_host=0
    if [ "${address%:*}" = "$local_address" ]; then is_host=1; fi
    here=(--local-addr "$local_address" --rdzv-conf "is_host=$is_host")
fi

# --tee: what the processes say, here and in runs/torchrun/RUN/.../RANK/*.log
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$address" --rdzv-id "$run" ${here[@]+"${here[@]}"} \
    --log-dir "runs/torchrun/$run" --tee 3 --module revdeq_lightning "$@" --run.resume=auto \
    --trainer.num_nodes="$nodes" --trainer.devices="$gpus"
