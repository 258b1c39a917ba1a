#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them: `bash tests/run.sh`, or with --full the slow ones too.
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=dev
. scripts/venv.sh
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
