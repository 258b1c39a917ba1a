#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them: `bash tests/run.sh`, or with --full the slow ones too.
# Further arguments go to pytest.
set -euo pipefail
for name in NANOCHAT_HUB_ROOT NANOCHAT_PYTHON TMPDIR; do # paths from where the user stands; Python's may be a name
    path="${!name:-/}"
    [[ "$path" == [/~]* || "$path" == [A-Za-z]:* || ("$name" == NANOCHAT_PYTHON && "$path" != */*) ]] || export "$name=$PWD/$path"
done
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
EXTRA=dev
. scripts/venv.sh
ruff check .
ruff format --check .
said=$(mktemp)
trap 'rm -f "$said"' EXIT
mypy >"$said" 2>&1 & # one thread, beside the tests
types=$!
# A file of tests at a time on each of two processes; their tensors are too small for more than one thread to pay.
code=0
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || code=$?
wait "$types" || code=$?
cat "$said"
exit "$code"
