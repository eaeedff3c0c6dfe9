"""PgBouncer as a process of its own, in transaction mode, with so few server connections that clients share them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import make_url

from tests.support.ports import free_port
from tests.support.servers import ServerProcess

if TYPE_CHECKING:
    from typing import Self

POOL_SIZE = 3
"""Server connections for each database."""

# Where distributions put it, beside PATH.
_PROGRAM_FOLDERS = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")


class NoPgBouncerError(Exception):
    """There is no PgBouncer on this machine. A failure, not a skip."""


class PgBouncer(ServerProcess):
    """A PgBouncer in front of all databases of a Postgres server, on a port of 127.0.0.1.

    As a context manager it is started on entry, and killed and deleted on exit. It may be killed and started
    again on the same port in between.

    Args:
        server_url: The URL of one of the server's databases. PgBouncer logs in as its user.
    """

    def __init__(self, server_url: str) -> None:
        program = _program()
        port = free_port()
        # As root it becomes another user, which has to reach this folder, and TMPDIR may be root's own.
        parent = "/tmp" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="mcp-session-store-pgbouncer-", dir=parent))
        settings = self._folder / "pgbouncer.ini"
        settings.touch(mode=0o600)
        settings.write_text(_settings(server_url, port, tracks_statements=_version(program) >= (1, 21)))
        super().__init__([program, str(settings)], log=self._folder / "log", port=port)

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except BaseException:
            self._delete()
            raise

    def __exit__(self, *details: object) -> None:
        try:
            super().__exit__(*details)
        finally:
            self._delete()

    def url_of(self, database_url: str, *, pgbouncer: str | None = "true") -> str:
        """The URL of a database of the server, by way of PgBouncer.

        Args:
            database_url: The URL without PgBouncer.
            pgbouncer: The option of that name; `None` to leave it out.
        """
        url = make_url(database_url).set(host="127.0.0.1", port=self.port)
        if pgbouncer is not None:
            url = url.update_query_dict({"pgbouncer": pgbouncer})
        return url.render_as_string(hide_password=False)

    def log(self) -> str:
        # Read when a test has failed, which may be after the end.
        return super().log() if self._folder.exists() else ""

    def _delete(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _program() -> str:
    program = shutil.which("pgbouncer", path=os.pathsep.join(_PROGRAM_FOLDERS))
    if program is None:
        raise NoPgBouncerError("there is no pgbouncer on this machine; .ci/interop installs Debian's")
    return program


def _version(program: str) -> tuple[int, int]:
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", output)
    assert found is not None, output
    return int(found[1]), int(found[2])


def _settings(server_url: str, port: int, *, tracks_statements: bool) -> str:
    url = make_url(server_url)
    settings: dict[str, object] = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        # Of clients nothing is asked. The server's user and password stand with the databases.
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": POOL_SIZE,
        "max_client_conn": 500,
        # After a failure it asks the server again sooner than after 15 s.
        "server_login_retry": 1,
    }
    if os.geteuid() == 0:
        settings["user"] = "nobody"
    if tracks_statements:
        # Older versions cannot do it, and newer ones do not have to.
        settings["max_prepared_statements"] = 0
    password = str(url.password or "").replace("'", "''")
    server = f"host={url.host} port={url.port or 5432} user={url.username} password='{password}'"
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "\n".join(["[databases]", f"* = {server}", "[pgbouncer]", *lines, ""])
