#!/usr/bin/env bash
# Train on one or several machines without a scheduler, and restart automatically when a process or a machine is lost.
# From the project's folder, run the same command on each machine:
#
#   NODES=2 GPUS=8 ADDRESS=10.0.0.1:29400 RUN=first configs/cluster/torchrun.sh \
#       fit --config configs/lm/wikitext103.yaml --config configs/trainer/ddp.yaml        (fsdp2.yaml: sharded)
#
# or: make train-nodes NODES=2 GPUS=8 ADDRESS=10.0.0.1:29400 NAME=first CONFIG=configs/lm/wikitext103.yaml. The
# arguments of the script are those of `python -m revdeq_lightning`. SIGTERM, SIGUSR1, or Ctrl-C to this script on one
# machine ends training on all of them with a checkpoint and exit code 75 (130 after Ctrl-C). The project's folder, or
# at least run.folder, must be on a file system that the machines share.
#
#   RUN             name of the run, its folder, and its W&B run; the same RUN resumes from its newest checkpoint
#   GPUS            number of GPUs of each machine, one process each (on a CPU: number of processes)
#   NODES           number of machines; default: 1
#   ADDRESS         HOST:PORT of one machine, where all of them meet; required for two or more. PORT: any free port
#   LOCAL_ADDRESS   how the others reach this machine; required if its host name does not resolve to that
#   MAX_RESTARTS    how often failed processes are restarted; default: 3
set -euo pipefail

run=${RUN:?RUN=NAME is required: the name of the run, the same on every machine}
gpus=${GPUS:?GPUS=N is required: the number of GPUs of each machine (on a CPU: of processes)}
nodes=${NODES:-1}
address=${ADDRESS:-localhost:0}
local_address=${LOCAL_ADDRESS:-}
python=${PYTHON:-.venv/bin/python}
if [ "$nodes" -gt 1 ] && [ -z "${ADDRESS:-}" ]; then
    echo "error: ADDRESS=HOST:PORT is required: one of the $nodes machines, where all of them meet" >&2
    exit 2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1
# Seconds to save after a signal to torchrun itself; PyTorch 2.11 ignores this and kills after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# A separate store for each start: in a shared one, the first process reads the addresses of earlier processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
here=()
if [ -n "$local_address" ]; then
    is_host=0
    if [ "${address%:*}" = "$local_address" ]; then is_host=1; fi
    here=(--local-addr "$local_address" --rdzv-conf "is_host=$is_host")
fi
training=(revdeq_lightning "$@" --run.resume=auto --trainer.num_nodes="$nodes" --trainer.devices="$gpus")

# Report a wrong setting here, once: torchrun would treat it as a failure and restart.
"$python" -m "${training[@]}" --print_config >/dev/null || exit

# torchrun restarts whatever fails. A requested end is not a failure: the processes exit with 0 and write the intended
# exit code to this file.
REVDEQ_STOPPED=$(mktemp)
export REVDEQ_STOPPED
trap 'rm -f "$REVDEQ_STOPPED"' EXIT

# --tee: show the processes' output here and write it to runs/torchrun/RUN/.../RANK/*.log
set -m  # in a separate process group, so that Ctrl-C reaches only this script
"$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$address" --rdzv-id "$run" ${here[@]+"${here[@]}"} \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --log-dir "runs/torchrun/$run" --tee 3 --module "${training[@]}" &
torchrun=$!
set +m

asked=  # the exit code, after a signal
ended=
end() { if kill "-$1" "$torchrun" 2>/dev/null; then ended=yes; fi; }
idle=0  # how often in a row there was no training process to tell
tell() {  # the training processes, or torchrun if there are none yet: it is waiting for other machines
    if pkill "-$1" -P "$torchrun"; then
        idle=0
    elif [ ! -s "$REVDEQ_STOPPED" ]; then
        idle=$((idle + 1))
        # Not at once: it may be restarting a process, and logs a traceback if it is interrupted.
        if [ "$1" = INT ] || [ "$idle" -gt 2 ]; then end TERM; fi
    fi
}
interrupt() {  # a second Ctrl-C ends immediately
    if [ "$asked" = 130 ]; then end INT; else asked=130 && tell INT; fi
}
trap 'asked=75' TERM USR1 HUP
trap interrupt INT

code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do  # a signal interrupted the wait, but training goes on
    if [ "$asked" = 75 ]; then tell USR1; fi  # repeatedly: it kills a process that is still starting
    sleep 2
done
wait "$torchrun" && code=0 || code=$?
if [ -s "$REVDEQ_STOPPED" ]; then
    code=$(cat "$REVDEQ_STOPPED")
elif [ -n "$ended" ] && [ "$code" != 0 ]; then
    code=$asked
fi
exit "$code"
