"""Ports that no other process of the tests picks, and that stay free while a test has its server down."""

from __future__ import annotations

import functools
import random
import socket
from collections import deque

# Below the range that kernels give to outgoing connections (Linux 32768, others 49152): between the stop
# and the restart of a server no client can be handed its port by accident.
_FIRST = 10240
_SHARES, _PORTS = 32, 448
"""Number of processes that can pick ports at once, and number of ports of each, more than one picks in a run."""


def free_port() -> int:
    """Return a free port on 127.0.0.1 that is this process's own, the one that it picked the longest time ago."""
    share = _share()
    for _ in range(len(share)):
        share.rotate(-1)
        with socket.socket() as probe:
            # As servers do: a port whose last connections are in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", share[-1]))
            except OSError:
                continue
        return share[-1]
    raise RuntimeError(f"no port is free of those from {min(share)} to {max(share)}")


@functools.cache
def _share() -> deque[int]:
    """Take a share of the ports, which is this process's own until its end.

    Of two processes that pick among the same ports, one would pick some time what the other is about to listen on.
    """
    for number in random.SystemRandom().sample(range(_SHARES), _SHARES):
        first = _FIRST + number * _PORTS
        mark = socket.socket()
        try:
            mark.bind(("127.0.0.1", first))
        except OSError:
            mark.close()
            continue
        # Bound until the process ends.
        mark.detach()
        return deque(range(first + 1, first + _PORTS))
    raise RuntimeError(f"{_SHARES} other processes have all ports from {_FIRST} on")
