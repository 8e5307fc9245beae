#!/usr/bin/env bash
# A training on one or several machines without a scheduler, that begins again by itself when a process or a machine is lost.
# From the project's folder, the same line on each machine:
#
#   NODES=2 GPUS=8 ADDRESS=10.0.0.1:29400 RUN=first configs/cluster/torchrun.sh \
#       fit --config configs/lm/wikitext103.yaml --config configs/trainer/ddp.yaml        (fsdp2.yaml: a model shared out)
#
# or: make train-nodes NODES=2 GPUS=8 ADDRESS=10.0.0.1:29400 NAME=first CONFIG=configs/lm/wikitext103.yaml. What follows the
# script is what follows `python -m revdeq_lightning`. SIGTERM, SIGUSR1 and Ctrl-C, to this script on one machine, end all with a
# checkpoint and exit code 75 (130 after Ctrl-C). The project's folder, or run.folder at least, must lie on a file
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
# Seconds to save after a signal to torchrun itself; PyTorch 2.11 does not know it, and kills after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Each start with a store of its own: in one that is shared, whoever comes first reads the addresses of the processes before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
here=()
if [ -n "$local_address" ]; then
    is_host=0
    if [ "${address%:*}" = "$local_address" ]; then is_host=1; fi
    here=(--local-addr "$local_address" --rdzv-conf "is_host=$is_host")
fi
training=(revdeq_lightning "$@" --run.resume=auto --trainer.num_nodes="$nodes" --trainer.devices="$gpus")

# A wrong setting is told here, once: torchrun would begin it again as if it were a failure.
"$python" -m "${training[@]}" --print_config >/dev/null || exit

# torchrun begins whatever fails again, and an end that was asked for is no failure: the processes end with 0, and write
# the exit code that they mean into this file.
REVDEQ_STOPPED=$(mktemp)
export REVDEQ_STOPPED
trap 'rm -f "$REVDEQ_STOPPED"' EXIT

# --tee: what the processes say, here and in runs/torchrun/RUN/.../RANK/*.log
set -m  # in a process group of its own: Ctrl-C is this script's
"$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$address" --rdzv-id "$run" ${here[@]+"${here[@]}"} \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --log-dir "runs/torchrun/$run" --tee 3 --module "${training[@]}" &
torchrun=$!
set +m

asked=  # the exit code, when a signal came
ended=
end() { if kill "-$1" "$torchrun" 2>/dev/null; then ended=yes; fi; }
tell() {  # the processes that train; torchrun where there are none yet, as it then only waits for other machines
    pkill "-$1" -P "$torchrun" || [ -s "$REVDEQ_STOPPED" ] || end TERM
}
interrupt() {  # a second Ctrl-C ends at once
    if [ "$asked" = 130 ]; then end INT; else asked=130 && tell INT; fi
}
trap 'asked=75' TERM USR1 HUP
trap interrupt INT

code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do  # a signal ended the wait, not the training
    if [ "$asked" = 75 ]; then tell USR1; fi  # again and again: a process that is being started dies of it
    sleep 2
done
wait "$torchrun" && code=0 || code=$?
if [ -s "$REVDEQ_STOPPED" ]; then
    code=$(cat "$REVDEQ_STOPPED")
elif [ -n "$ended" ] && [ "$code" != 0 ]; then
    code=$asked
fi
exit "$code"
