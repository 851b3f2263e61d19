"""Hosts that are network namespaces of this machine, on one switch: cables that can be cut, and processes on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from tests.marked import end_marked, marked

MARK = "MEGARL_TEST_HOSTS"


def missing() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if not shutil.which("ip"):
        return "not installed: iproute2 (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"megarl-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    """`count` hosts with addresses 10.77.0.1, ... in a namespace each; a further namespace holds the switch."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.tag, self.count, self.folder = uuid.uuid4().hex[:6], count, folder
        self.mark = f"{MARK}={self.tag}"
        self.processes_of: list[subprocess.Popen] = []

    def name(self, host: int) -> str:
        return f"megarl-{self.tag}-{host}"

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    @property
    def switch(self) -> str:
        return f"megarl-{self.tag}-switch"

    def __enter__(self) -> Hosts:
        try:
            self._ip("netns", "add", self.switch)
            self._ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
            self._ip("-n", self.switch, "link", "set", "switch", "up")
            for host in range(self.count):
                self._add(host)
        except BaseException:
            self.close()
            raise
        return self

    def _add(self, host: int) -> None:
        name, plug = self.name(host), f"port{host}"
        self._ip("netns", "add", name)
        self._ip("-n", name, "link", "add", "net0", "type", "veth", "peer", "name", plug, "netns", self.switch)
        self._ip("-n", self.switch, "link", "set", plug, "master", "switch", "up")
        self._ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "net0")
        self._ip("-n", name, "link", "set", "lo", "up")
        self._ip("-n", name, "link", "set", "net0", "up")

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"

    def cut(self, host: int) -> None:
        """Pull the host's cable at the switch: nobody is told."""
        self._ip("-n", self.switch, "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        self._ip("-n", self.switch, "link", "set", f"port{host}", "master", "switch")

    def limit(self, host: int, rate: str) -> str:
        """Make the host's cable slow, as `tc` says rates; why that cannot be, if it cannot."""
        words = ["tc", "-n", self.name(host), "qdisc", "add", "dev", "net0", "root", "tbf", "rate", rate,
                 "burst", "64kb", "latency", "200ms"]  # fmt: skip
        return subprocess.run(words, capture_output=True, text=True).stderr.strip()

    def start(self, host: int, command: Sequence[object], output: Path, **env: str) -> subprocess.Popen:
        """Run a command on a host; its output goes to a file."""
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
        clean |= {MARK: self.tag, "MEGARL_NODE": f"host{host}", **env}
        with open(output, "ab") as out:
            process = subprocess.Popen(["ip", "netns", "exec", self.name(host), *map(str, command)], env=clean,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)  # fmt: skip
        self.processes_of.append(process)
        return process

    def processes(self) -> list[int]:
        """Processes of the hosts that are still there."""
        return marked(self.mark)

    def namespaces(self) -> list[str]:
        lines = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
        return [line.split()[0] for line in lines if self.tag in line]

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and take the namespaces away."""
        end_marked(self.mark)
        for process in self.processes_of:
            process.wait()
        for name in self.namespaces():
            subprocess.run(["ip", "netns", "del", name], check=True)
