"""A real SLURM cluster on this one machine: munged, slurmctld and a slurmd for each node, all in one folder.

Everything is started in the foreground as a child, with a mark in its environment that steps and jobs inherit, so that
`stop` can end what the daemons leave, and `processes` can tell that nothing is left.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megarl.launcher import _die_with
from tests.marked import end_marked, marked

MARK = "MEGARL_TEST_CLUSTER"
PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}

CONF = """
ClusterName=megarl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    absent = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install {' '.join(absent)})"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """`nodes` nodes n0, n1, ... in partition `main`, which is the default; n0 alone in partition `one`; jobs in `urgent` take
    the nodes of those in `main`, which have a minute to end."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.folder, self.nodes = folder, [f"n{number}" for number in range(nodes)]
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)  # munge wants its socket to be reachable
        ports = _free_ports(1 + nodes)
        lines = [CONF.format(host=socket.gethostname().partition(".")[0], ports=ports, folder=folder)]
        for node, port in zip(self.nodes, ports[1:], strict=True):
            lines.append(f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus}\n")
        lines.append(
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE GraceTime=60 State=UP\n"
        )
        lines.append("PartitionName=one Nodes=n0 MaxTime=60 State=UP\n")
        lines.append(f"PartitionName=urgent Nodes={','.join(self.nodes)} MaxTime=60 PriorityTier=9 State=UP\n")
        (folder / "slurm.conf").write_text("".join(lines))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.mark = f"{MARK}={folder}"
        path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env = {**clean, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, MARK: str(folder)}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        folder = self.folder
        files = [
            f"--{kind}={folder}/munge.{end}"
            for kind, end in (
                ("socket", "socket"),
                ("key-file", "key"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        ]
        self._daemon("munged", "munged", "--foreground", "--force", *files)
        self._until(lambda: (folder / "munge.socket").exists(), "munged has no socket")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self._until(lambda: self.states() == {node: "idle" for node in self.nodes}, "the nodes are not idle")

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def _daemon(self, name: str, *command: str) -> None:
        parent = os.getpid()
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=lambda: _die_with(parent),
            )  # fmt: skip

    def _until(self, happened: Callable[[], bool], problem: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            for name, daemon in self.daemons.items():
                assert daemon.poll() is None, f"{name} ended: {(self.folder / f'{name}.out').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{problem} after {timeout} s: {self.states()}"
            time.sleep(0.1)

    def run(self, *command: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of a user of the cluster."""
        return subprocess.run(
            [str(word) for word in command], env=self.env, text=True, capture_output=True, timeout=timeout
        )

    def states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t", "-p", "main").stdout.split("\n")
        return dict(line.split() for line in lines if line)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """Cancel the jobs, end the daemons, then whatever they have left."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.run("scancel", "--full", "--signal=KILL", "--user=root", timeout=10)
        for name in (*self.nodes, "slurmctld", "munged"):
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        end_marked(self.mark)

    def processes(self) -> list[int]:
        """Processes of the cluster and its jobs that are still there."""
        return marked(self.mark)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, from below those that the kernel hands out."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.append(port)
    return found
