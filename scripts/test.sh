#!/usr/bin/env bash
# Sets up .venv and runs lint, format, types and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/ty check revnet_jax scripts
exec .venv/bin/python -m pytest "$@"
