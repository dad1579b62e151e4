# shellcheck shell=bash disable=SC2034,SC2154 # variables pass between this file and a launcher
# What the launchers share: flags, checks before anything costs money, commands that are shown.
#
# A launcher sets `flags` to the names of its flags, and a variable of each name to its default;
# a flag whose default is false takes no value.

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit # the clone: paths in flags are relative to it
train_args=()

fail() {
  echo "error: $*" >&2
  exit 1
}

note() { echo "$*" >&2; }

# Prints the comment at the head of the launcher.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/launch/$(basename "$0")"; }

# Reads the launcher's flags into variables, and what follows -- into train_args.
parse_flags() {
  local arg key
  while [ $# -gt 0 ]; do
    arg=$1 key=${1%%=*} key=${key#--}
    shift
    case $arg in
      --help) usage && exit ;;
      --) train_args=("$@") && break ;;
      --*) ;;
      *) fail "got $arg, expected --name=value, and train.py's own flags after --" ;;
    esac
    case " $flags " in
      *" $key "*) ;;
      *) fail "got --$key, expected one of --${flags// / --}; train.py's own flags go after --" ;;
    esac
    case $arg/${!key} in
      "--$key/false" | "--$key/true") printf -v "$key" true ;;
      */false | */true) fail "got $arg, expected --$key without a value" ;;
      "--$key/"*) fail "got $arg, expected $arg=VALUE" ;;
      *) printf -v "$key" %s "${arg#*=}" ;;
    esac
  done
  # A dry run's commands go to stdout, ready to paste; those that are run are told on stderr.
  if $dry_run; then exec 3>&1; else exec 3>&2; fi
}

# expect FLAG PATTERN WHAT: refuses a flag that is missing or does not look like WHAT.
expect() {
  [ -n "${!1}" ] || fail "--$1 is missing: expected $3"
  [[ ${!1} =~ ^($2)$ ]] || fail "got --$1=${!1}, expected $3"
}

# Quotes arguments for another shell: this one's, ssh's at the far end, a container's.
quote() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Shows a command and runs it; a dry run only shows it.
run() {
  if $dry_run; then quote "$@" >&3; else echo "+ $(quote "$@")" >&3 && "$@"; fi
}

# query ASSUMED COMMAND...: what the command answers; in a dry run, ASSUMED.
query() {
  local assumed=$1
  shift
  if $dry_run; then quote "$@" >&3 && echo "$assumed"; else "$@"; fi
}

# need PROGRAM WHERE: a dry run does without.
need() {
  $dry_run || command -v "$1" >/dev/null || fail "got no $1 on PATH, expected it: $2"
}

# Sets config and workdir to train.py's flags of these names. Its flags that say where it runs, or
# that it does not, are the launcher's business.
read_train_flags() {
  local arg
  config='' workdir=''
  for arg in "${train_args[@]}"; do
    case $arg in
      --config=*) config=${arg#*=} ;;
      --workdir=*) workdir=${arg#*=} ;;
      --config | --workdir) fail "got $arg, expected $arg=VALUE" ;;
      --dry_run* | --nodry_run* | --num_devices* | --num_slices* | --platform* | \
        --coordinator_address* | --num_processes* | --process_id*)
        fail "got $arg after --, expected flags of the run alone: the launcher sets it itself" ;;
    esac
  done
  [ -n "$config" ] || fail "--config is missing after --: expected --config=configs/FILE.py"
  [ -n "$workdir" ] || fail "--workdir is missing after --: expected --workdir=runs/NAME"
  [ -f "${config%%:*}" ] ||
    fail "got --config=$config, expected a file of this clone, such as configs/lm_1b.py"
}

# check_folder FLAG PATH: of a bucket, or of the clone on a machine, and here.
check_folder() {
  case $2 in
    /* | . | ./* | .. | ../* | */. | */./* | */.. | */../* | *//*)
      fail "got --$1=$2, expected a relative path such as runs/NAME: a folder of the bucket or the" \
        "clone" ;;
  esac
}

# The machines get HEAD: what runs is in the history.
check_clone() {
  git rev-parse --verify --quiet HEAD >/dev/null ||
    fail "got no commit in $PWD, expected a git clone: its HEAD is what the machines get"
  git cat-file -e "HEAD:./${config%%:*}" 2>/dev/null ||
    fail "got --config=$config, expected a file of HEAD, which is what the machines get: commit it"
  check_folder workdir "$workdir"
  [ -z "$(git status --porcelain --untracked-files=no)" ] ||
    note "warning: uncommitted changes stay here; the machines get HEAD," \
      "$(git log -1 --format='%h of %cs')"
}

# resolve_config PLATFORM DEVICES [SLICES]: train.py checks its flags, and the mesh on that many
# devices, while it costs nothing; in a dry run too.
resolve_config() {
  local check=(env JAX_PLATFORMS=cpu .venv/bin/python scripts/train.py "${train_args[@]}" --dry_run
    --platform="$1" --num_devices="$2" --num_slices="${3:-1}")
  run "${check[@]}" >/dev/null
  if $dry_run && [ -x .venv/bin/python ]; then "${check[@]}" >/dev/null; fi
}

# The same, where there is what it takes: a launcher's machine need not have installed anything.
resolve_config_if_installed() {
  if [ -x .venv/bin/python ]; then
    resolve_config "$@"
  else
    note "warning: train.py's flags were not checked, for want of .venv: scripts/setup.sh makes it"
  fi
}

# expect_bucket: --bucket, if it is given, looks like one.
expect_bucket() {
  [ -z "$bucket" ] || expect bucket '[a-z0-9][-a-z0-9_.]+[a-z0-9]' \
    "a bucket's name, without gs://, of three or more letters and digits"
}

# gcloud is there and knows who asks for what.
check_gcloud() {
  need gcloud "install the Google Cloud CLI"
  [ -n "$(query someone gcloud auth list '--filter=status:ACTIVE' '--format=value(account)')" ] ||
    fail "got no active account from gcloud, expected one: gcloud auth login"
  [ -n "$project" ] || [ -n "$(query some-project gcloud config get-value project)" ] ||
    fail "--project is missing, and gcloud has no default: gcloud config set project PROJECT"
}

# The bucket is there, if any is named.
check_bucket() {
  [ -z "$bucket" ] || query "$bucket" gcloud storage buckets describe "gs://$bucket" \
    '--format=value(name)' >/dev/null || fail "got --bucket=$bucket, expected a bucket that exists"
}

# fetch_bucket FOLDER: copies it here. Checkpoints are large, and safe where they are.
fetch_bucket() {
  run mkdir -p "$1" &&
    run gcloud storage rsync --recursive '--exclude=^checkpoints/' "gs://$bucket/$1" "$1"
}
