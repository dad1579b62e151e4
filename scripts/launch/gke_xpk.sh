#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as an xpk workload that restarts after preemption.
#
#   scripts/launch/gke_xpk.sh --cluster=my-cluster --zone=us-west4-a --name=rev --type=v5litepod-16 \
#     --storage=revnet \
#     -- --config=configs/lm_1b.py --config.data.dir=/mnt/bucket/data --workdir=runs/lm1b
#   scripts/launch/gke_xpk.sh --cluster=my-cluster --zone=us-west4-a --name=rev --delete
#
#   --cluster, --zone  of the cluster; xpk cluster create makes one
#   --name             of the workload
#   --type             TPU type of a slice: v5litepod-16, v6e-256, tpu7x-8, ...
#   --num_slices       1
#   --storage          of the cluster, attached once as below; --workdir is a folder of it
#   --base_image       with Python 3.11 or later and bash; xpk adds this clone's HEAD. python:3.12
#   --project          gcloud's default, if not given
#   --priority         very-low, low, medium, high or very-high; medium
#   --max_restarts     after preemptions and lost machines; 100. A failure of train.py is final
#   --fetch=WORKDIR    alone, with --bucket: fetches the results, without checkpoints
#   --bucket           for --fetch
#   --delete           alone: deletes the workload, running or not
#   --dry_run          prints the commands and runs none
#
# A bucket becomes a storage by
#   options=implicit-dirs,file-system:rename-dir-limit:1000000
#   options=$options,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
#   xpk storage attach revnet --cluster=my-cluster --zone=us-west4-a --type=gcsfuse --size=1 \
#     --bucket=my-bucket --mount-point=/mnt/bucket --readonly=false --auto-mount=false \
#     --mount-options=$options
# Without the options workers may not see what others wrote, nor complete a checkpoint.
set -euo pipefail
flags="cluster zone name type num_slices storage base_image project priority max_restarts"
flags="$flags fetch bucket delete dry_run"
cluster='' zone='' name='' type='' storage='' project='' fetch='' bucket=''
num_slices=1 base_image=python:3.12 priority=medium max_restarts=100 delete=false dry_run=false
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
parse_flags "$@"

expect cluster '[a-z]([-a-z0-9]*[a-z0-9])?' "a cluster's name: lower-case letters, digits, hyphens"
expect zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, such as us-west4-a"
expect name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "up to 40 lower-case letters, digits and hyphens"
expect_bucket
workload=(--workload="$name" --cluster="$cluster" --zone="$zone" ${project:+--project="$project"})

if [ ${#train_args[@]} = 0 ]; then
  $delete || [ -n "$fetch" ] ||
    fail "got nothing to do, expected train.py's flags after --, --fetch=WORKDIR or --delete"
  [ -z "$fetch" ] || [ -n "$bucket" ] || fail "--bucket is missing: expected the one to fetch from"
  [ -z "$fetch" ] || check_folder fetch "$fetch"
  check_gcloud
  [ -z "$fetch" ] || check_bucket
  if [ -n "$fetch" ]; then fetch_bucket "$fetch"; fi
  if $delete; then
    need xpk "pip install xpk"
    run xpk workload delete "${workload[@]}" --force
  fi
  exit
fi

if $delete || [ -n "$fetch" ]; then fail "got --delete or --fetch with a run, expected them alone"; fi
expect type '(v4|v5p|tpu7x)-[1-9][0-9]*|(v5litepod|v6e)-(1|4|8|16|32|64|128|256)' \
  "a TPU type, such as v5litepod-16 or v5p-32"
expect num_slices '[1-9][0-9]*' "a number of slices"
expect storage '[a-z]([-a-z0-9]*[a-z0-9])?' "the name of a storage that xpk attached (see --help)"
expect max_restarts '[0-9]+' "a number"
expect priority 'very-low|low|medium|high|very-high' "very-low, low, medium, high or very-high"
read_train_flags
check_clone
check_gcloud
need xpk "pip install xpk"
case $type in v4-* | v5p-*) devices=$((${type##*-} / 2)) ;; *) devices=${type##*-} ;; esac
resolve_config_if_installed tpu $((devices * num_slices)) "$num_slices"

# xpk puts the folder into the image, where it is the current one.
folder=${TMPDIR:-/tmp}/revnet_jax-$name
run rm -rf "$folder"
run mkdir -p "$folder"
run git archive --format=tar --output="$folder.tar" HEAD
run tar -xf "$folder.tar" -C "$folder"

# `exec` because xpk tells only its direct child of a preemption. It restarts by itself after a loss
# of machines; 75 is train.py's status after it saved a checkpoint and stopped.
train_args=("${train_args[@]/#--workdir=/--workdir=/mnt/bucket/}")
command="scripts/setup.sh tpu && exec .venv/bin/python -u scripts/train.py $(quote "${train_args[@]}")"
run xpk workload create "${workload[@]}" --tpu-type="$type" --num-slices="$num_slices" \
  --storage="$storage" --base-docker-image="$base_image" --script-dir="$folder" \
  --priority="$priority" --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 --command="$command"
note "the log: kubectl logs --follow --tail=-1 --selector=\
jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
