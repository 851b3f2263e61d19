#!/usr/bin/env bash
# Everything that takes longer than tools/test.sh may: the tests marked slow, then one line per test with its time in
# tools/bench/results/slow_tests.md. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh
mkdir -p tools/bench/results
xml=$(mktemp)
trap 'rm -f "$xml"' EXIT
code=0
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow --timeout 3600 --junit-xml "$xml" "$@" || code=$?
.venv/bin/python - "$xml" tools/bench/results/slow_tests.md <<'PY'
import datetime
import os
import sys
import xml.etree.ElementTree as ET

source, target = sys.argv[1:]
rows = [
    f"| {case.get('classname')}.{case.get('name')} | {float(case.get('time')):.0f} s | "
    f"{'failed' if case.find('failure') is not None or case.find('error') is not None else 'skipped' if case.find('skipped') is not None else 'passed'} |"
    for case in ET.parse(source).iter("testcase")
]
with open(target, "w") as out:
    cores, today = len(os.sched_getaffinity(0)), datetime.date.today()
    out.write(f"# Slow tests\n\n`tools/test_slow.sh` on {cores} CPU cores, {today}.\n\n")
    out.write("\n".join(["| test | time | result |", "|---|---|---|", *rows]) + "\n")
PY
exit "$code"
