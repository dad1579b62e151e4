#!/usr/bin/env bash
# The job that slurm.sh submits: slurm_job.sh MAX_RESTARTS TRAIN_FLAGS...
# Two minutes before its time is up every process is told to stop (not this shell, which has to see
# them end): train.py saves a checkpoint and exits with 75, and the job goes back into the queue.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
max_restarts=$1 restarts=${SLURM_RESTART_COUNT:-0}
shift

# This shell is told to stop by scancel, which is meant, and by preemption, after which Slurm itself
# puts the job back: either way it waits for srun to end, and asks for nothing.
ended=false
trap 'ended=true' TERM
# A process that has stopped must not end those that still write their part of the checkpoint.
status=0
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  .venv/bin/python -u scripts/train.py "$@" || status=$?

if [ "$status" = 75 ] && ! $ended && [ "$restarts" -lt "$max_restarts" ]; then
  echo "the run was told to stop and saved a checkpoint; back into the queue ($restarts restarts so far)"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
echo "train.py ended with status $status"
exit "$status"
