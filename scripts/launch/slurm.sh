#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster, one process per GPU, in a job that saves a checkpoint before
# its time is up, goes back into the queue, and resumes, until the run is complete.
#
#   scripts/launch/slurm.sh --name=rev --nodes=2 --gpus_per_node=8 --time=12:00:00 --partition=gpu \
#     -- --config=configs/lm_1b.py --config.data.dir=/scratch/me/data --workdir=/scratch/me/runs/lm1b
#
#   --name            of the job
#   --nodes           1
#   --gpus_per_node   all processes of a node see all of these
#   --cpus_per_gpu    for the data; 8
#   --time            limit of one stay on the nodes; the partition's, if not given
#   --partition, --account, --qos    the cluster's defaults, if not given
#   --extra           what scripts/setup.sh installs here for the nodes; cuda13
#   --max_restarts    how often the job may go back into the queue; 100
#   --dry_run         prints the commands and runs none
#
# Run it on a login node, in a clone on the file system that the nodes share: they use this folder as
# it is when the job starts. Other options of sbatch: SBATCH_* variables, such as SBATCH_CONSTRAINT.
set -euo pipefail
flags="name nodes gpus_per_node cpus_per_gpu time partition account qos extra max_restarts dry_run"
name='' gpus_per_node='' time='' partition='' account='' qos=''
nodes=1 cpus_per_gpu=8 extra=cuda13 max_restarts=100 dry_run=false
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
parse_flags "$@"

expect name '[A-Za-z0-9][-A-Za-z0-9_.]*' "a name of letters, digits, hyphens and dots"
expect nodes '[1-9][0-9]*' "a number of nodes"
expect gpus_per_node '[1-9][0-9]*' "a number of GPUs"
expect cpus_per_gpu '[1-9][0-9]*' "a number of CPU cores"
expect max_restarts '[0-9]+' "a number"
[ -z "$time" ] || expect time '([0-9]+-)?[0-9]+(:[0-9]+){0,2}' "a time limit, such as 12:00:00 or 2-0"
[ ${#train_args[@]} -gt 0 ] || fail "got nothing to run, expected train.py's flags after --"
read_train_flags
need sbatch "run this on a login node of the cluster"

run scripts/setup.sh "$extra"
resolve_config gpu $((nodes * gpus_per_node))
run mkdir -p runs
# JAX takes process i of a node to own GPU i of those it sees: as many tasks as GPUs, and no
# --gpus-per-task, which would show each task its own GPU only.
run sbatch --job-name="$name" --chdir="$PWD" --output="runs/%x-%j.log" --nodes="$nodes" \
  --gpus-per-node="$gpus_per_node" --ntasks-per-node="$gpus_per_node" \
  --cpus-per-task="$cpus_per_gpu" ${time:+--time="$time"} ${partition:+--partition="$partition"} \
  ${account:+--account="$account"} ${qos:+--qos="$qos"} \
  scripts/launch/slurm_job.sh "$max_restarts" "${train_args[@]}"
note "the log: tail -F runs/$name-JOBID.log; stop it for good: scancel JOBID"
