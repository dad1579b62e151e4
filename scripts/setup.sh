#!/usr/bin/env bash
# Makes .venv in the clone, with what pyproject.toml asks for, in the versions that were tested.
#   scripts/setup.sh [EXTRA,...]     extras: plots, tensorboard, text, pretrained, docs, tpu,
#                                    cuda13, gpu_compiler, transformers, timm, lm_eval, dev
# Needs Python 3.11 or later; PYTHON names another interpreter than python3, VENV another directory
# than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
venv=${VENV:-.venv}
stamp=$venv/installed${extras:+-${extras//,/-}}
if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: got $("$python" --version 2>&1), expected Python 3.11 or later: set PYTHON" >&2
  exit 1
fi
echo "installing into $PWD/$venv" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable ".${extras:+[$extras]}"
touch "$stamp"
