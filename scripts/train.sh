#!/usr/bin/env bash
# Sets up .venv and runs scripts/train.py; without arguments, trains the digits RevNet.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
if [ $# -eq 0 ]; then set -- --config=configs/digits.py --workdir=runs/digits; fi
exec .venv/bin/python scripts/train.py "$@"
