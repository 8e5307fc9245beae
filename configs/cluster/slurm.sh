#!/usr/bin/env bash
# Train on a SLURM cluster, on one machine or many, beyond the time limit of a job. From the project's folder:
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 configs/cluster/slurm.sh \
#       fit --config configs/lm/wikitext103.yaml --config configs/trainer/ddp.yaml        (fsdp2.yaml: sharded)
#
# or: make submit NODES=2 GPUS=8 CONFIG=configs/lm/wikitext103.yaml. The arguments of the script are those of
# `python -m revdeq_lightning`. Options of sbatch before the script override the lines below.
#
#SBATCH --job-name=revdeq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1       # one process per GPU of a machine
#SBATCH --cpus-per-task=4         # per process: itself and its data-loading workers
#SBATCH --time=24:00:00           # the limit of one allocation; training may need many
#SBATCH --signal=B:USR1@300       # SLURM sends SIGUSR1 to this script five minutes before the limit,
#SBATCH --requeue                 # and the script requeues the job, as SLURM does when a machine fails
#SBATCH --open-mode=append        # all allocations append to the same logs
#SBATCH --output=slurm-%j.log     # of this script; the processes log to runs/slurm/JOB/rank-N.log
set -uo pipefail

grace=${GRACE:-240}                     # seconds after the signal until the job is requeued, saved or not
python=${PYTHON:-.venv/bin/python}
logs=runs/slurm/$SLURM_JOB_ID
mkdir -p "$logs"

# The processes meet on the first machine, at a port that Lightning derives from the job's id.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1

echo "$(date '+%F %T') job $SLURM_JOB_ID, allocation $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NODELIST; logs: $logs"
time_is_up=
trap 'time_is_up=${time_is_up:-$SECONDS}' USR1
trap : TERM  # SLURM signals the training itself: wait until it has saved

# SIGUSR1 would kill Python before the program's first line installs a handler, so ignore it until then.
# --wait: seconds that the other processes have after one has ended. They only need it if a process is lost.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=120 --output="$logs/rank-%t.log" --open-mode=append \
    bash -c 'trap "" USR1; exec "$@"' - "$python" -m revdeq_lightning "$@" --run.resume=auto \
    --trainer.num_nodes="$SLURM_JOB_NUM_NODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" &
step=$!

wait "$step"
while kill -0 "$step" 2>/dev/null; do  # a signal interrupted the wait, but training goes on
    if [ -n "$time_is_up" ]; then
        if [ $((SECONDS - time_is_up)) -ge "$grace" ]; then
            echo "$(date '+%F %T') still running $grace s after SIGUSR1: requeued, resumes from the newest checkpoint"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        scancel --quiet --signal=USR1 "$SLURM_JOB_ID"  # repeatedly: a process that is still starting ignores it
    fi
    sleep 2
done
wait "$step"
code=$?

# 75: training was asked to end, has saved, and can resume; 138: it was still starting, and SIGUSR1 killed it.
# Without SIGUSR1 there is nothing to do: SLURM itself requeues a job when it takes a machine away.
case "$code:$time_is_up" in
    75:?* | 138:?*)
        echo "$(date '+%F %T') time limit reached (exit code $code): requeued"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) echo "$(date '+%F %T') ended with exit code $code" ;;
esac
exit "$code"
