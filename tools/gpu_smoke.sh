#!/usr/bin/env bash
# Runs what needs an NVIDIA GPU and writes gpu_smoke.json and gpu_smoke.md: the quickstart's end-to-end test on CUDA first,
# then tests/gpu, then the engine's and the learner's tests.
#   tools/gpu_smoke.sh [FOLDER] [pytest arguments]     FOLDER: tools/bench/results by default
# PYTHON=/path/to/python chooses the installation (launch/Containerfile has one); otherwise .venv's, then the one in PATH.
# Exit code: 0 all passed; 1 a test failed; 2 there is nothing to run on, with one line that says what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
exec "$python" tools/gpu_smoke.py "$@"
