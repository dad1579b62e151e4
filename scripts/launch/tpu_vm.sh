#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice: creates it or takes the one there is, installs this clone's HEAD
# on every worker, runs scripts/train.py, shows worker 0's log, and fetches the results.
#
#   scripts/launch/tpu_vm.sh --name=rev --zone=us-west4-a --type=v5litepod-16 --bucket=my-bucket \
#     -- --config=configs/lm_1b.py --config.data.dir=/mnt/bucket/data --workdir=runs/lm1b
#   scripts/launch/tpu_vm.sh --name=rev --zone=us-west4-a --delete
#
#   --name, --zone    of the slice
#   --type            its accelerator type: v5litepod-16, v5p-32, v6e-8, ...
#   --bucket          is mounted at /mnt/bucket on every worker, and --workdir is a folder of it;
#                     slices of more than one worker need it
#   --project         gcloud's default, if not given
#   --version         of the machines' image, if not the one for the type
#   --delete          deletes the slice, however the run ended, once the results are safe (without
#                     --bucket not one that stopped: it goes on from there);
#                     without it the slice is kept, and costs
#   --stop            alone: has the run save a checkpoint and stop
#   --fetch=WORKDIR   alone: fetches its results (checkpoints stay in a bucket)
#   --poll_seconds    between attempts to attach again; 30
#   --dry_run         prints the commands and runs none
#
# The run belongs to the machines: when the connection or this terminal ends it goes on, and the
# same command attaches to it again, or resumes it.
# Status: 0 complete, 75 stopped after saving a checkpoint, 70 train.py failed, 1 anything else.
set -euo pipefail
flags="name zone type bucket project version delete stop fetch poll_seconds dry_run"
name='' zone='' type='' bucket='' project='' version='' fetch=''
delete=false stop=false dry_run=false poll_seconds=30 created=false
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
parse_flags "$@"
# shellcheck source-path=SCRIPTDIR source=tpu_common.sh
. scripts/launch/tpu_common.sh

delete_slice() { run gcloud compute tpus tpu-vm delete "$name" "${place[@]}"; }

create_or_reuse() {
  local state
  state=$(query '' gcloud compute tpus tpu-vm list "${place[@]}" "--filter=name~/$name\$" \
    '--format=value(state)')
  case $state in
    '')
      run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" \
        --version="$version" ||
        fail "$name could not be created, see above; --delete deletes what there may be of it"
      created=true
      ;;
    READY) note "taking the slice $name that is there" ;;
    *) fail "got the slice $name in state $state, expected READY: wait, or delete it by --delete" ;;
  esac
}

install() {
  install_on_slice && return
  if $created && $delete; then delete_slice && fail "$name could not be made ready, see above"; fi
  fail "$name could not be made ready, see above; it is kept, and costs: --delete deletes it"
}

# Follows the run through lost connections, of which nobody needs to know.
follow() {
  local attempt status
  for attempt in 1 2 3 4 5; do
    status=0
    run_on_slice || status=$?
    case $status in 0 | 70 | 75) return "$status" ;; esac
    note "gcloud ended with status $status; attaching again, attempt $attempt of 5"
    sleep "$poll_seconds"
  done
  fail "lost the connection to $name, where the run goes on, and costs: the same command goes on" \
    "with it"
}

check_slice
if [ ${#train_args[@]} = 0 ]; then
  without_run
else
  check_run
  create_or_reuse
  install
  status=0
  follow || status=$?
  finish "$status"
fi
