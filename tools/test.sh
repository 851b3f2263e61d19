#!/usr/bin/env bash
# All tests but the slow ones: style, layers, then pytest, whose summary line closes the output.
# Arguments go to pytest: tools/test.sh tests/unit -k config. Without any, two files are tested at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh
.venv/bin/ruff check .
.venv/bin/lint-imports
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest -m "not slow" "$@"
