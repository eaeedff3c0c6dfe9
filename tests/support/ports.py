"""Ports that stay free while a test has its server down."""

from __future__ import annotations

import random
import socket

# Below the range that kernels give to outgoing connections (Linux 32768, others 49152): between the stop
# and the restart of a server no client can be handed its port by accident.
_FIRST, _LAST = 10240, 32767
_RANDOM = random.SystemRandom()


def free_port() -> int:
    """Return a free port on 127.0.0.1 that the kernel gives to no outgoing connection."""
    for _ in range(200):
        port = _RANDOM.randint(_FIRST, _LAST)
        with socket.socket() as probe:
            # As servers do: a port whose last connections are in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no free port between {_FIRST} and {_LAST} in 200 tries")
