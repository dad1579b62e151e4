#!/usr/bin/env bash
# Trains on a Cloud TPU slice that is queued for and may be taken away: waits for it, trains as
# tpu_vm.sh does, and when it is preempted asks for another and resumes, until the run is complete.
#
#   scripts/launch/tpu_queued.sh --name=rev --zone=us-west4-a --type=v5litepod-16 --spot \
#     --bucket=my-bucket --delete \
#     -- --config=configs/lm_1b.py --config.data.dir=/mnt/bucket/data --workdir=runs/lm1b
#   scripts/launch/tpu_queued.sh --name=rev --zone=us-west4-a --delete
#
#   --name, --zone    of the queued resource, and of its slice
#   --type            its accelerator type: v5litepod-16, v5p-32, v6e-8, ...
#   --spot            cheap, and preempted at any time
#   --bucket          is mounted at /mnt/bucket on every worker, and --workdir is a folder of it
#   --project         gcloud's default, if not given
#   --version         of the machines' image, if not the one for the type
#   --max_restarts    how often the run may be resumed; 100
#   --delete          deletes slice and request, however the run ended; without it they are kept,
#                     and cost
#   --stop            alone: has the run save a checkpoint and stop (first end the launcher that
#                     waits for it, which would resume)
#   --fetch=WORKDIR   alone: fetches its results (checkpoints stay in the bucket)
#   --poll_seconds    between looks at the queue; 60
#   --dry_run         prints the commands of a run that nobody interrupts, and runs none
#
# Status: 0 complete, 75 stopped too often, 70 train.py failed (final), 1 anything else.
set -euo pipefail
flags="name zone type spot bucket project version max_restarts"
flags="$flags delete stop fetch poll_seconds dry_run"
name='' zone='' type='' bucket='' project='' version='' fetch=''
spot=false delete=false stop=false dry_run=false max_restarts=100 poll_seconds=60
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
parse_flags "$@"
# shellcheck source-path=SCRIPTDIR source=tpu_common.sh
. scripts/launch/tpu_common.sh

delete_slice() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force
}

create() {
  local spot_flag=()
  if $spot; then spot_flag=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${spot_flag[@]+"${spot_flag[@]}"}
}

# look ASSUMED_REQUEST ASSUMED_SLICE: sets state to REQUEST/SLICE, the states of both. Hours of
# waiting outlast a network: where gcloud cannot tell, it is asked again later.
look() {
  local found=("${place[@]}" "--filter=name~/$name\$") request slice
  request=$(query "$1" gcloud compute tpus queued-resources list "${found[@]}" \
    '--format=value(state.state)') &&
    slice=$(query "$2" gcloud compute tpus tpu-vm list "${found[@]}" '--format=value(state)') &&
    state=${request:-NONE}/${slice:-NONE} || state=UNKNOWN
}

# What else gcloud fails at is tried again, but not for ever.
again() {
  failures=$((failures + 1))
  [ "$failures" -le 5 ] || fail "gcloud failed $failures times in a row, see above; what there is" \
    "of $name is kept, and costs: the same command goes on with it"
  sleep "$poll_seconds"
}

# Returns when the slice is ready, having asked for it where there is none or a dead one.
wait_for_slice() {
  local told=''
  look '' ''
  while [ "$state" != ACTIVE/READY ]; do
    [ "$state" = "$told" ] || note "$(date +%H:%M:%S) request and slice: $state"
    told=$state
    case $state in
      NONE/NONE) if create; then failures=0; else again; fi ;;
      NONE/*) fail "got a slice $name without a request, expected none: take another --name" ;;
      SUSPENDED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED) delete_slice || again ;;
      FAILED/*) fail "the request failed: see gcloud compute tpus queued-resources describe $name" \
        "--zone=$zone, and remove it by --delete" ;;
      *) sleep "$poll_seconds" ;;
    esac
    look ACTIVE READY
  done
}

check_slice
expect max_restarts '[0-9]+' "a number"
if [ ${#train_args[@]} = 0 ]; then
  without_run
  exit
fi
[ -n "$bucket" ] || fail "--bucket is missing: what is saved on a slice is gone with the slice"
check_run
failures=0 # of gcloud, in a row
for ((restarts = 0; ; restarts++)); do
  wait_for_slice
  status=0 started=$SECONDS
  { install_on_slice && run_on_slice; } || status=$?
  case $status in
    0 | 70) finish "$status" ;;
    75) failures=0 ;;
    *) ((SECONDS - started < 600)) || failures=0 ;; # so long it was well
  esac
  [ "$restarts" -lt "$max_restarts" ] || finish 75
  note "$(date +%H:%M:%S) interrupted (status $status); resuming"
  # A slice that is being taken away looks ready for a while.
  if [ "$status" = 75 ]; then sleep "$poll_seconds"; else again; fi
done
