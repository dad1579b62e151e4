#!/usr/bin/env bash
# What the launchers do on each machine of a Cloud TPU slice:
#
#   tpu_worker.sh install [BUCKET]     .venv, and the bucket at /mnt/bucket
#   tpu_worker.sh run TRAIN_FLAGS...   start the run or find it live; follow it to its end
#   tpu_worker.sh stop                 have it save a checkpoint and stop
#
# The run is detached: it outlives the connection, and asking for it again follows it again. It
# holds the lock ~/revnet_jax.lock while it lives; its log is ~/revnet_jax.log.
# `run` exits with 0 or 75 if train.py did, with 70 if it failed, and with 71 if JAX aborted it because
# another worker is gone: every other status is ssh's.
set -euo pipefail
self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
clone=$(cd "$(dirname "$0")/../.." && pwd)
cd ~

install_clone() {
  local mounted
  cd "$clone"
  export PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    # The machines' own Python is older than the 3.11 that is needed; uv fetches another.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    uv=$(python3 -m site --user-base)/bin/uv
    "$uv" python install --quiet 3.12
    PYTHON=$("$uv" python find 3.12)
  fi
  scripts/setup.sh tpu
  if [ -z "$1" ]; then return; fi
  mounted=$(findmnt --noheadings --output SOURCE /mnt/bucket) || mount_bucket "$1"
  if [ "${mounted:-$1}" != "$1" ]; then
    echo "error: got the bucket $mounted at /mnt/bucket, expected $1: take another slice" >&2
    exit 1
  fi
}

mount_bucket() {
  local source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse >/dev/null; then
    curl --fail --silent --show-error --location "$source/doc/apt-key.gpg" |
      sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release --codename --short) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A machine that has just booted is often updating itself: wait for its lock.
    sudo apt-get --quiet --option DPkg::Lock::Timeout=600 update
    sudo apt-get --quiet --option DPkg::Lock::Timeout=600 --yes install gcsfuse
  fi
  sudo install --directory --owner="$(id -un)" /mnt/bucket
  # Workers must see at once what another wrote, so nothing about files is cached; a checkpoint is
  # complete when its folder is renamed, which a bucket without folders of its own allows on request.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" /mnt/bucket
}

# Runs train.py to its end, holding the lock by descriptor 9, which it does not pass on.
hold() {
  trap : TERM # a machine that shuts down tells everyone; the status must still be written
  local status=0
  cd "$clone"
  # shellcheck disable=SC2016 # for the inner shell to expand
  bash -c 'echo $$ >~/revnet_jax.pid && exec "$@"' train \
    .venv/bin/python -u scripts/train.py "$@" 9>&- || status=$?
  echo "$status" >~/revnet_jax.status
}

run() {
  local flags status worker tail=''
  printf -v flags '%q ' "$@"
  exec 9>revnet_jax.lock
  if flock --timeout 1 9; then
    rm -f revnet_jax.status
    echo "$flags" >revnet_jax.flags
    setsid bash "$self" hold "$@" </dev/null >revnet_jax.log 2>&1 &
  elif [ "$flags" != "$(cat revnet_jax.flags)" ]; then
    echo "error: got $flags, expected the live run's $(cat revnet_jax.flags): --stop stops it" >&2
    exit 70
  fi
  exec 9>&-
  worker=$(curl --fail --silent --max-time 5 --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) ||
    worker=0
  if [ "$worker" = 0 ]; then tail -n 20 -f revnet_jax.log & tail=$!; fi
  flock --shared revnet_jax.lock true # until the run ends
  if [ -n "$tail" ]; then sleep 1 && kill "$tail"; fi
  status=$(cat revnet_jax.status 2>/dev/null) || status=75 # the machine went down under it
  case $status in 0 | 75) exit "$status" ;; esac
  if [ "$worker" != 0 ]; then tail -n 30 revnet_jax.log >&2; fi
  echo "error: train.py ended with status $status on worker $worker" >&2
  if [ "$status" = 134 ]; then exit 71; fi
  exit 70
}

stop() {
  if flock --timeout 1 revnet_jax.lock true; then echo "no run is live" && return; fi
  kill -TERM "$(cat revnet_jax.pid)"
  flock --shared --timeout 600 revnet_jax.lock true
}

case ${1:-} in
  install) install_clone "${2:-}" ;;
  run | hold | stop) "$@" ;;
  *) echo "error: got '${1:-}', expected install, run or stop" >&2 && exit 1 ;;
esac
