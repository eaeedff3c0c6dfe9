"""nginx as a process of its own, with one of the recipes of `examples/nginx`."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

from tests.support.ports import free_port
from tests.support.servers import ROOT, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_PORTS = ("8001", "8002")
"""Ports of the server's processes in a recipe."""
_PORT = "8080"
"""Port of nginx in a recipe."""
_MAIN = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log stderr info;
{user}
events {{}}
http {{
    access_log off;
    {temporary}
    include {recipe};
}}
"""
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Nginx(ServerProcess):
    """nginx in front of two processes of a server, on a port of 127.0.0.1.

    A context manager: it is started on entry, and killed on exit.

    Args:
        recipe: Name of a file in `examples/nginx`, used as it is but for the ports.
        ports: Ports of the two processes.
        folder: Folder for its files.
        text: Settings to use in the place of the recipe's.
    """

    def __init__(self, recipe: str, ports: Sequence[int], folder: Path, *, text: str | None = None) -> None:
        program = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
        assert program is not None, "there is no nginx on this machine; .ci/interop installs Debian's"
        port = free_port()
        if text is None:
            text = (ROOT / "examples" / "nginx" / recipe).read_text()
        for named, real in zip((_PORT, *_PORTS), (port, *ports), strict=True):
            assert f"127.0.0.1:{named};" in text
            text = text.replace(f"127.0.0.1:{named};", f"127.0.0.1:{real};")
        (folder / recipe).write_text(text)
        # As root its workers become another user, which has to reach the folder of bodies.
        temporary = tempfile.mkdtemp(prefix="nginx-", dir=folder)
        main = _MAIN.format(
            folder=folder,
            recipe=folder / recipe,
            user="user root;" if os.geteuid() == 0 else "",
            temporary="\n    ".join(f"{name}_temp_path {temporary}/{name};" for name in _TEMPORARY),
        )
        settings = folder / "nginx.conf"
        settings.write_text(main)
        super().__init__([program, "-c", str(settings), "-e", "stderr"], log=folder / "nginx.log", port=port)
