#!/usr/bin/env bash
# A training on a cluster with SLURM, on one machine or many, that outlives its time limit. From the project's folder:
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 configs/cluster/slurm.sh \
#       fit --config configs/lm/wikitext103.yaml --config configs/trainer/ddp.yaml        (fsdp2.yaml: a model shared out)
#
# or: make submit NODES=2 GPUS=8 CONFIG=configs/lm/wikitext103.yaml. What follows the script is what follows
# `python -m revdeq_lightning`. An option of sbatch before the script overrides the line here that it names.
#
#SBATCH --job-name=revdeq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1       # one process for each GPU of a machine
#SBATCH --cpus-per-task=4         # for each process: itself, and the workers that load its data
#SBATCH --time=24:00:00           # the limit of one stay; the training may need many
#SBATCH --signal=B:USR1@300       # five minutes before the limit SLURM sends SIGUSR1 to this script ...
#SBATCH --requeue                 # ... which may then put the job back into the queue, as SLURM does when a machine fails
#SBATCH --open-mode=append        # each stay goes on writing the same logs
#SBATCH --output=slurm-%j.log     # of this script; each process has its own, in runs/slurm/JOB/rank-N.log
set -uo pipefail

grace=${GRACE:-240}                     # so many seconds after the signal the job goes back whether it has saved or not
python=${PYTHON:-.venv/bin/python}
logs=runs/slurm/$SLURM_JOB_ID
mkdir -p "$logs"

# Where the processes meet: on the first machine, at a port that Lightning makes of the job's id.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1

echo "$(date '+%F %T') job $SLURM_JOB_ID, stay $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST; logs: $logs"
time_is_up=
trap 'time_is_up=${time_is_up:-$SECONDS}' USR1
trap : TERM  # the training is told by SLURM itself: wait until it has saved

# Until Python notes SIGUSR1, which is from its first line on, it would die of it: so ignore it until then.
# --wait: when one process ended, the others have so many seconds; it is never so long, unless one is lost.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=120 --output="$logs/rank-%t.log" --open-mode=append \
    bash -c 'trap "" USR1; exec "$@"' - "$python" -m revdeq_lightning "$@" --run.resume=auto \
    --trainer.num_nodes="$SLURM_JOB_NUM_NODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" &
step=$!

wait "$step"
while kill -0 "$step" 2>/dev/null; do  # a signal ended the wait, not the training
    if [ -n "$time_is_up" ]; then
        if [ $((SECONDS - time_is_up)) -ge "$grace" ]; then
            echo "$(date '+%F %T') not ended $grace s after SIGUSR1: back into the queue, from the newest checkpoint"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        scancel --quiet --signal=USR1 "$SLURM_JOB_ID"  # again and again: a process that is being started ignores it
    fi
    sleep 2
done
wait "$step"
code=$?

# 75: the training was asked to end, saved, and can go on; 138: it was only just starting, and died of SIGUSR1.
# Without SIGUSR1 this is no matter of ours: SLURM itself puts back a job that it takes a machine from.
case "$code:$time_is_up" in
    75:?* | 138:?*)
        echo "$(date '+%F %T') the time is up (exit code $code): back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) echo "$(date '+%F %T') ended with exit code $code" ;;
esac
exit "$code"
