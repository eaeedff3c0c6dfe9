"""Ports of processes that run at once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from tests.support.ports import free_port
from tests.support.servers import ROOT

CODE = """
import json
from tests.support.ports import free_port
print(json.dumps([free_port() for _ in range(200)]), flush=True)
input()
"""


def test_no_two_processes_pick_the_same_port() -> None:
    others = [
        subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        picked = [free_port() for _ in range(200)]
        for other in others:
            assert other.stdout is not None
            picked += json.loads(other.stdout.readline())
    finally:
        for other in others:
            other.communicate(b"\n", timeout=60)
    assert len(set(picked)) == len(picked) == 800


def test_a_port_in_use_is_passed_over() -> None:
    used = free_port()
    with socket.create_server(("127.0.0.1", used)):
        assert used not in [free_port() for _ in range(1000)]
