# shellcheck shell=bash disable=SC2034,SC2154 # variables pass between this file and a launcher
# What the launchers of Cloud TPU VMs share. A launcher defines delete_slice.

archive=${TMPDIR:-/tmp}/revnet_jax-$name.tgz
worker=revnet_jax/scripts/launch/tpu_worker.sh

# Sets place, what every gcloud command about this slice takes.
check_slice() {
  expect name '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' "a name of lower-case letters, digits and hyphens"
  expect zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, such as us-west4-a"
  expect_bucket
  [ -z "$project" ] || expect project '[a-z0-9][-a-z0-9.:]+' "the id of a project"
  expect poll_seconds '[0-9]+' "a number of seconds"
  place=(--zone="$zone" ${project:+--project="$project"} --quiet)
}

# Sets workers, devices and version from the accelerator type. v5litepod and v6e types count chips,
# of which up to 8 are one machine, else 4; the others count cores, 8 a machine, and JAX sees one
# device for two of them from v4 on.
check_type() {
  expect type '(v2|v3|v4|v5p)-[0-9]+|(v5litepod|v6e)-(1|4|8|16|32|64|128|256)' \
    "an accelerator type, such as v5litepod-16, v5p-32 or v6e-8"
  local size=${type##*-} image
  case $type in
    v5litepod-* | v6e-*) devices=$size workers=$((size <= 8 ? 1 : size / 4)) ;;
    *)
      ((size > 0 && size % 8 == 0)) || fail "got --type=$type, expected a multiple of 8 cores"
      devices=$((size / 2)) workers=$((size / 8))
      ;;
  esac
  case $type in
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    v4-*) image=tpu-ubuntu2204-base ;;
    *) image=tpu-ubuntu2204-base devices=$size ;;
  esac
  version=${version:-$image}
}

# Everything that can be wrong with a run, before anything costs money.
check_run() {
  if $stop || [ -n "$fetch" ]; then fail "got --stop or --fetch with a run, expected them alone"; fi
  check_type
  read_train_flags
  check_clone
  [ "$workers" = 1 ] || [ -n "$bucket" ] ||
    fail "--bucket is missing: the $workers workers of $type need a --workdir that all of them see"
  check_gcloud
  check_bucket
  resolve_config_if_installed tpu "$devices"
  # On the machines a bucket's folders are under the mount.
  [ -z "$bucket" ] || train_args=("${train_args[@]/#--workdir=/--workdir=/mnt/bucket/}")
  trap 'note "$name is kept, and costs: the same command goes on with it"; exit 130' INT
}

# on_workers WHICH COMMAND: with `all`, gcloud returns the first status that is not 0.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

# Copies HEAD to every worker and installs it. A run that is live holds the lock, and keeps the code
# it started with.
install_on_slice() {
  run git archive --format=tar.gz --prefix=revnet_jax/ --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:revnet_jax.tgz" "${place[@]}" --worker=all &&
    on_workers all "flock --timeout 1 --conflict-exit-code 0 revnet_jax.lock tar -xzf revnet_jax.tgz \
&& $worker install $bucket"
}

# Starts the run or finds it live, and follows it. Status 0: complete; 75: it saved a checkpoint and
# stopped; 70: train.py failed; any other: a worker, ssh or gcloud failed, and the run is to be found
# again, or resumed.
run_on_slice() { on_workers all "$worker run $(quote "${train_args[@]}")"; }

# fetch_results WORKDIR
fetch_results() {
  if [ -n "$bucket" ]; then
    fetch_bucket "$1"
  else
    run mkdir -p "$(dirname "$1")" && run gcloud compute tpus tpu-vm scp --recurse \
      "$name:revnet_jax/$1" "$(dirname "$1")" "${place[@]}" --worker=0
  fi
}

# finish STATUS: after a run. Without a bucket the results are on the slice alone.
finish() {
  if ! fetch_results "$workdir"; then
    [ -n "$bucket" ] || fail "the results of $workdir could not be fetched: $name is kept, and costs"
    note "warning: $workdir could not be fetched; it is gs://$bucket/$workdir"
  fi
  if $delete && ! { [ -z "$bucket" ] && [ "$1" = 75 ]; }; then
    delete_slice
  else # without a bucket, what a run that stopped goes on from is on the slice alone
    note "$name is kept, and costs: --delete deletes it"
  fi
  if $dry_run; then exit; fi
  case $1 in
    0) note "the run is complete" ;;
    75) note "the run stopped after saving a checkpoint: the same command resumes it" ;;
    *) note "error: train.py failed, see above" ;;
  esac
  exit "$1"
}

# Without flags for train.py: --stop, --fetch and --delete, in this order.
without_run() {
  $stop || $delete || [ -n "$fetch" ] ||
    fail "got nothing to do, expected train.py's flags after --, --stop, --fetch=WORKDIR or --delete"
  [ -z "$fetch" ] || check_folder fetch "$fetch"
  check_gcloud
  [ -z "$fetch" ] || check_bucket
  if $stop; then on_workers all "$worker stop"; fi
  if [ -n "$fetch" ]; then fetch_results "$fetch"; fi
  if $delete; then delete_slice; fi
}
