"""After a fault: `python -m megarl.cluster.peers NODES_JSON` names the nodes that this one can no longer reach.

`NODES_JSON` is what `megarl.cluster.node_check` kept: node -> its address and ranks. A machine that is there answers a
connection to a port where nothing listens with a refusal.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUIET_PORT = 1  # nothing listens on it
PATIENCE = 5.0  # seconds


def is_reachable(address: str, port: int = QUIET_PORT, patience: float = PATIENCE) -> bool:
    """Whether the machine at `address` answers, be it with a refusal."""
    try:
        with socket.create_connection((address, port), timeout=patience):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def lost(nodes: dict[str, dict], own: str) -> list[str]:
    """A line for each node but `own` that does not answer; `nodes`: name -> address and ranks."""
    others = {name: node for name, node in nodes.items() if name != own and node["address"]}
    if not others:
        return []
    with ThreadPoolExecutor(min(64, len(others))) as pool:
        answers = pool.map(lambda node: is_reachable(node["address"]), others.values())
    return [
        f"node {name} ({node['address']}, rank{'s' if len(node['ranks']) > 1 else ''} {', '.join(map(str, node['ranks']))}) "
        f"is lost: it does not answer node {own}"
        for (name, node), answered in zip(others.items(), answers, strict=True)
        if not answered
    ]


if __name__ == "__main__":
    for line in lost(json.loads(Path(sys.argv[1]).read_text()), os.environ.get("MEGARL_NODE") or os.uname().nodename):
        print(f"error: {line}", file=sys.stderr)
