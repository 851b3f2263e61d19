"""The way to the first node: `python -m megarl.cluster.interface ADDRESS` prints interface, own address, and yes or no."""

from __future__ import annotations

import socket
import sys

import psutil

from megarl.errors import BadInput


def interface_to(address: str) -> tuple[str, str, bool]:
    """(interface, own address on it, whether `address` is one of this machine's own) on the way to `address`.

    Raises `BadInput` when the name is unknown or there is no way there.
    """
    try:
        target = socket.getaddrinfo(address, 1, socket.AF_INET, socket.SOCK_DGRAM)[0][4][0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((target, 1))  # sends nothing
            own = s.getsockname()[0]
    except OSError as e:
        raise BadInput(f"{address}: no way there from {socket.gethostname()} ({e.strerror})") from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == own for found in addresses):
            return name, own, own == target
    if own.startswith("127."):  # all of them are the loopback interface's
        return "lo", own, True
    raise BadInput(f"{address}: no interface has the address {own} that leads there")


if __name__ == "__main__":
    try:
        interface, own, is_own = interface_to(sys.argv[1])
    except BadInput as e:
        sys.exit(f"error: {e}")
    print(interface, own, "yes" if is_own else "no")
