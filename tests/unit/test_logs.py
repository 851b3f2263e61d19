"""What is written during a quiet start-up ends in the file, whoever writes it, and the terminal is back afterwards."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, subprocess, sys
from megarl.platform.logs import quiet_to_log

print("before")
try:
    with quiet_to_log(sys.argv[1]):
        print("from python", flush=True)
        os.write(2, b"from c" + bytes([10]))
        subprocess.run(["sh", "-c", "echo from a child"], check=True)
        print("not flushed", end="")
        raise ValueError
except ValueError:
    os.write(2, b"after" + bytes([10]))
"""


def test_everyone_writes_to_the_file_until_the_end_or_an_error(tmp_path):
    log = tmp_path / "deep" / "start.log"
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, text=True, check=True)
        assert (run.stdout, run.stderr) == ("before\n", "after\n")
    assert log.read_text() == "from python\nfrom c\nfrom a child\nnot flushed" * 2
