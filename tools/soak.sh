#!/usr/bin/env bash
# Kills ranks of short quickstart runs at random moments, has them come back, and compares what is left with runs that
# nobody disturbed. Goes on where it was stopped; the kills are counted in tools/bench/results/soak.md.
# tools/soak.sh [--kills 200] [--minutes N] [--parts sft,rl] [--folder runs/soak]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || tools/setup.sh
exec .venv/bin/python -m tools.soak "$@"
