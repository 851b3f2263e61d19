#!/usr/bin/env bash
# All tests but the slow ones: style, layers, then pytest, whose summary line closes the output.
# Arguments go to pytest: tools/test.sh tests/unit -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh
.venv/bin/ruff check .
.venv/bin/lint-imports
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -m "not slow" "$@"
