"""What the launcher's tests start as a rank: `rank_program.py BEHAVIOUR FOLDER`.

Every rank leaves its pid in FOLDER, starts one helper in its own process group and one in a session of its own, and
says that it is ready once its signal handlers stand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megarl import launcher

behaviour, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
stop = []


def note(name: str, text: str) -> None:
    (folder / f".{name}{rank}").write_text(text)
    os.rename(folder / f".{name}{rank}", folder / f"{name}{rank}")


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, _: stop.append(n))
helpers = [subprocess.Popen(["sleep", "120"], start_new_session=own) for own in (False, True)]
(Path(tempfile.gettempdir()) / f"of-rank-{rank}").touch()
note("pids", " ".join(str(p) for p in (os.getpid(), *(h.pid for h in helpers))))
print(f"noise of rank {rank}", flush=True)
screen = launcher.terminal()
if screen is not None:
    print("display of rank 0", file=screen)

if behaviour == "third time":
    note("restarts", str(launcher.restarts()))
    if rank == "1" and launcher.restarts() < 2:
        other = folder / "restarts0"
        while not other.exists() or other.read_text() != str(launcher.restarts()):
            time.sleep(0.02)
        launcher.Place(folder / "logs", 1).write(f"rl step {launcher.restarts() + 1}, update")
        os.kill(os.getpid(), signal.SIGKILL)
    if launcher.restarts() == 2:
        sys.exit(0)
if behaviour == "succeed":
    sys.exit(0)
if rank == "1":
    while behaviour in ("raise", "report", "crash") and not (folder / "ready0").exists():
        time.sleep(0.02)
    if behaviour == "raise":
        raise ValueError("the second rank gives up")
    if behaviour == "report":
        launcher.report_failure("prompts.jsonl:3: no answer", 2)
        sys.exit(2)
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
note("ready", "")
while not (stop and behaviour != "deaf"):
    time.sleep(0.02)
if behaviour == "boundary":
    time.sleep(0.3)
    note("boundary", str(stop[0]))
