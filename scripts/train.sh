#!/usr/bin/env bash
# Sets up .venv and runs scripts/train.py; without arguments, trains the digits RevNet.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/setup.sh"
if [ $# -eq 0 ]; then
  cd "$root"
  set -- --config=configs/digits.py --workdir=runs/digits
fi
exec "$root/.venv/bin/python" "$root/scripts/train.py" "$@"
