"""A start that cannot succeed fails with one line that says what to do; what may pass is waited for."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import socketserver
import stat
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import aiosqlite  # noqa: F401 - before its libraries cannot be read any more
import pytest
from mcp.server.mcpserver import MCPServer
from sqlalchemy.engine import make_url

from mcp_session_store import durable_app
from mcp_session_store.errors import SchemaError, StoreMisconfigured
from mcp_session_store.sql.schema import migrate
from tests.support.commands import UNREACHABLE
from tests.support.ports import free_port
from tests.support.postgres import execute
from tests.support.secure_postgres import BARRED, HOST, SecurePostgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import URL
    from starlette.applications import Starlette
    from starlette.types import Message

    from tests.support.commands import CommandFunction, InvokeFunction

TARGET = "tests.support.targets:mcpserver"
SECRET = "s3cret-of-the-test"


@contextmanager
def as_another_user() -> Iterator[None]:
    """Take away root's rights over all files for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def migrated_file(folder: Path) -> Path:
    file = folder / "sessions.db"
    asyncio.run(migrate.upgrade(f"sqlite:///{file}"))
    return file


def no_database(folder: Path) -> str:
    (folder / "notes.txt").write_bytes(b"text " * 1000)
    return f"sqlite:///{folder}/notes.txt"


def damaged(folder: Path) -> str:
    file = migrated_file(folder)
    content = bytearray(file.read_bytes())
    content[100:8192] = b"\xff" * 8092
    file.write_bytes(content)
    return f"sqlite:///{file}"


def read_only_file(folder: Path) -> str:
    file = migrated_file(folder)
    file.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    return f"sqlite:///{file}"


def unreadable_file(folder: Path) -> str:
    file = migrated_file(folder)
    file.chmod(0)
    return f"sqlite:///{file}"


def closed_folder(folder: Path) -> str:
    (folder / "closed").mkdir(mode=0o555)
    return f"sqlite:///{folder}/closed/sessions.db"


def locked_folder(folder: Path) -> str:
    (folder / "locked" / "data").mkdir(parents=True)
    (folder / "locked").chmod(0o600)
    return f"sqlite:///{folder}/locked/data/sessions.db"


def long_name(folder: Path) -> str:
    return f"sqlite:///{folder}/{'n' * 300}.db"


def none_is_made(folder: Path) -> str:
    return f"sqlite:///file:{folder}/sessions.db?uri=true&mode=rw"


def folder_instead(folder: Path) -> str:
    return f"sqlite:///{folder}"


def missing_folder(folder: Path) -> str:
    return f"sqlite:///{folder}/missing/sessions.db"


def file_instead_of_folder(folder: Path) -> str:
    (folder / "file").write_text("")
    return f"sqlite:///{folder}/file/sessions.db"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return f"sqlite:///{folder}/pipe"


def device(folder: Path) -> str:
    (folder / "null").symlink_to(os.devnull)
    return f"sqlite:///{folder}/null"


def socket_file(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
    return f"sqlite:///{folder}/socket"


def circle(folder: Path) -> str:
    (folder / "link").symlink_to(folder / "link")
    return f"sqlite:///{folder}/link"


def link_into_nothing(folder: Path) -> str:
    (folder / "link").symlink_to(folder / "missing" / "sessions.db")
    return f"sqlite:///{folder}/link"


FILES: dict[str, tuple[Callable[[Path], str], str]] = {
    "no database": (no_database, r"notes.txt cannot be used: the file is no SQLite database; name another one"),
    "damaged": (damaged, r"cannot be used: the file is damaged; put a backup"),
    "read only": (read_only_file, r"this process \(user \d+\) may not read and write the file '/.*sessions.db'"),
    "unreadable": (unreadable_file, r"may not read and write the file"),
    "closed folder": (closed_folder, r"may not write in the folder '/.*/closed'.*name a file in another folder"),
    "locked folder": (locked_folder, r"\(user \d+\) may not enter the folder '/.*/locked'; allow it"),
    "long name": (long_name, r"no file can have the path '/.*n\.db' \(File name too long\); correct it"),
    "mode rw": (none_is_made, r"there is no file '/.*/sessions\.db', and with mode=rw none is made"),
    "a folder": (folder_instead, r"is a folder; name a file in it"),
    "missing folder": (missing_folder, r"there is no folder '/.*/missing'; make it"),
    "a file as folder": (file_instead_of_folder, r"'/.*/file' is no folder; correct the path"),
    "pipe": (pipe, r"'/.*/pipe' is a device, a pipe or a socket, .*name a file"),
    "device": (device, r"'/dev/null' is a device, a pipe or a socket, .*name a file"),
    "socket": (socket_file, r"'/.*/socket' is a device, a pipe or a socket, .*name a file"),
    "circle": (circle, r"'/.*/link' is a link that leads nowhere; correct the path"),
    "link into nothing": (link_into_nothing, r"there is no folder '/.*/missing'; make it"),
}


async def lifespan_of(app: Starlette) -> tuple[list[Message], BaseException | None]:
    """Start an app as servers do; return what it sends, and what it raises."""
    sent: list[Message] = []
    incoming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Message:
        return next(incoming)

    async def send(message: Message) -> None:
        sent.append(message)

    try:
        await app({"type": "lifespan", "state": {}}, receive, send)
    except Exception as error:
        return sent, error
    return sent, None


def assert_start_fails(invoke: InvokeFunction, url: str, expected: str, **options: Any) -> None:
    """Check that neither an app nor `serve` starts, and that each says in one line why."""
    app = durable_app(MCPServer("notes"), url, **options)
    sent, error = asyncio.run(lifespan_of(app))
    assert isinstance(error, (StoreMisconfigured, SchemaError))
    assert error.__cause__ is None
    (message,) = sent
    assert message["type"] == "lifespan.startup.failed"
    assert re.search(expected, message["message"]), message
    assert message["message"] == f"the server cannot start: {error}"
    given = [f"--{name}={value}" for name, value in options.items() if name != "events"]
    result = invoke("serve", TARGET, "--url", url, *given, *(["--events"] if options.get("events") else []))
    assert result.exit_code == 3, result.output
    assert result.output == f"Error: {error}\n"
    for text in (str(error), result.output):
        assert SECRET not in text
        assert text.rstrip("\n").count("\n") == 0


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_used_fails_the_start(invoke: InvokeFunction, kind: str) -> None:
    make, expected = FILES[kind]
    with TemporaryDirectory() as folder:
        # A folder that any user may reach.
        url = make(Path(folder))
        Path(folder).chmod(0o777)
        with as_another_user() if "this process" in expected or "may not" in expected else nullcontext():
            assert_start_fails(invoke, url, expected)
            # What only reads needs no right to write.
            if "and write" not in expected and "in the folder" not in expected:
                for command in (("check",), ("sessions", "list"), ("doctor",)):
                    done = invoke(*command, "--url", url)
                    assert done.exit_code == 1, done.output
                    assert re.search(expected, done.output.replace(". To do: ", "; ")), done.output
                    assert "chmod" not in done.output or "is no SQLite database" in expected or "damaged" in expected


def test_a_file_system_that_is_read_only_fails_the_start(
    invoke: InvokeFunction, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a container whose root is; only an administrator can mount one here.
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert_start_fails(invoke, sqlite_url, "the file system of '/.*' is read-only; name a file on one that can be")


def test_a_server_in_a_folder_that_may_not_be_entered_is_reported_as_missing(invoke: InvokeFunction) -> None:
    with TemporaryDirectory() as folder:
        Path(folder, "server.py").touch()
        Path(folder).chmod(0o600)
        with as_another_user():
            done = invoke("serve", f"{folder}/server.py", "--url", "sqlite:///sessions.db")
    assert done.exit_code == 2, done.output
    assert f"there is no file {folder}/server.py that this process may read" in done.output


def test_a_schema_that_does_not_fit_fails_the_start(invoke: InvokeFunction, postgres_url: str) -> None:
    execute(postgres_url, "CREATE SCHEMA empty")
    assert_start_fails(
        invoke, postgres_url, r"holds no tables.*mcp-session-store upgrade .*--schema empty", schema="empty"
    )
    asyncio.run(migrate.upgrade(postgres_url, revision="1_0001_sessions"))
    assert_start_fails(
        invoke, postgres_url, r"is at 1_0001_sessions, and 1_\w+ is needed; .*run: mcp-session-store upgrade"
    )
    asyncio.run(migrate.upgrade(postgres_url))
    execute(postgres_url, "ALTER TABLE mcp_session_journal RENAME TO kept")
    assert_start_fails(invoke, postgres_url, r'not what is there .*"mcp_session_journal" does not exist\); put back')
    execute(postgres_url, "UPDATE mcp_session_version SET version_num = '2_0001_future'")
    assert_start_fails(invoke, postgres_url, r"is at 2_0001_future.*pip install --upgrade")


def test_what_postgres_refuses_for_good_fails_the_start(invoke: InvokeFunction, postgres_url: str) -> None:
    asyncio.run(migrate.upgrade(postgres_url))
    role, schema = f"role_{uuid4().hex[:8]}", f"s_{uuid4().hex[:8]}"
    url = make_url(postgres_url)

    def shown(changed: URL) -> str:
        return changed.render_as_string(hide_password=False)

    with ExitStack() as stack:
        execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
        stack.callback(execute, postgres_url, f"DROP OWNED BY {role}; DROP ROLE {role}")
        poor = url.set(username=role, password=SECRET)
        assert_start_fails(invoke, shown(url.set(password=SECRET)), "refuses the user or the password; correct them")
        assert_start_fails(invoke, shown(url.set(database="absent")), "no such database; create it")
        denied = r"permission denied for table mcp_session_version\); grant it; the command doctor lists all"
        assert_start_fails(invoke, shown(poor), denied)
        execute(postgres_url, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        missing = "lacks privileges; run: GRANT INSERT, UPDATE, DELETE ON mcp_session TO"
        assert_start_fails(invoke, shown(poor), missing)
        execute(postgres_url, f"GRANT INSERT, UPDATE, DELETE ON mcp_session, mcp_session_journal TO {role}")
        execute(postgres_url, f"GRANT UPDATE, DELETE ON mcp_session_log, mcp_session_message TO {role}")
        execute(postgres_url, f"GRANT DELETE ON mcp_session_event TO {role}")
        execute(postgres_url, f"GRANT INSERT, UPDATE, DELETE ON mcp_session_state TO {role}")
        execute(
            postgres_url, f"GRANT INSERT, UPDATE, DELETE ON mcp_session_value, mcp_session_stream_message TO {role}"
        )
        without = r"run: GRANT INSERT ON mcp_session_message TO the user; GRANT INSERT, UPDATE, DELETE ON mcp_sess"
        assert_start_fails(invoke, shown(poor), without)
        execute(postgres_url, f"GRANT INSERT, UPDATE, DELETE ON mcp_session_message, mcp_session_instance TO {role}")
        assert asyncio.run(lifespan_of(durable_app(MCPServer("notes"), shown(poor))))[1] is None
        without = r"run: GRANT INSERT ON mcp_session_log TO the user; GRANT INSERT ON mcp_session_event TO"
        assert_start_fails(invoke, shown(poor), without, events=True)
        execute(postgres_url, f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        assert asyncio.run(lifespan_of(durable_app(MCPServer("notes"), shown(poor), events=True)))[1] is None
        option = shown(poor.update_query_dict({"options": f"-cwork_mem={SECRET}"}))
        assert_start_fails(invoke, option, "parameter 'work_mem' that options in the URL set; correct or remove it")
        execute(postgres_url, f"CREATE SCHEMA {schema}")
        execute(postgres_url, f"ALTER ROLE {role} SET search_path = {schema}")
        assert_start_fails(invoke, shown(poor), "may use no schema of its search path; run: GRANT USAGE")
        execute(postgres_url, f"ALTER DATABASE {url.database} CONNECTION LIMIT 100")
        execute(postgres_url, f"REVOKE CONNECT ON DATABASE {url.database} FROM PUBLIC")
        denied = (
            rf'permission denied for database "{url.database}"\); run: GRANT CONNECT ON DATABASE "{url.database}" TO'
        )
        assert_start_fails(invoke, shown(poor), denied)
        execute(postgres_url, f"ALTER ROLE {role} NOLOGIN")
        assert_start_fails(invoke, shown(poor), r"may not log in; run: ALTER ROLE name LOGIN")


# The event loops of the starts end before the server has taken leave of connections that were refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_scram_over_tls_works_as_the_url_asks_for_and_says_what_is_wrong(
    invoke: InvokeFunction, tmp_path: Path
) -> None:
    with SecurePostgres(tmp_path) as server:
        execute(server.url(), f"CREATE ROLE {BARRED} LOGIN PASSWORD '{SECRET}'")
        asyncio.run(migrate.upgrade(server.url()))

        def url(host: str = HOST, **options: str) -> str:
            changed = make_url(server.url()).set(host=host).update_query_dict(options)
            return changed.render_as_string(hide_password=False)

        authority, other = str(server.authority), str(server.other_authority)
        for options in (
            {},
            {"sslmode": "require"},
            {"sslmode": "verify-ca", "sslrootcert": authority},
            {"sslmode": "verify-full", "sslrootcert": authority},
        ):
            assert asyncio.run(lifespan_of(durable_app(MCPServer("notes"), url(**options))))[1] is None
        refused = r"certificate of the server is refused \(.*{}.*\); name the authority that signed it by sslrootcert="
        by_address = url("127.0.0.1", sslmode="verify-full", sslrootcert=authority)
        for wrong, expected in {
            url(sslmode="verify-ca", sslrootcert=other): refused.format("local issuer"),
            by_address: refused.format("not valid for '127.0.0.1'"),
            url(sslmode="disable"): r"only with TLS, or not at all; add sslmode=require",
            url(sslmode="require").replace("postgres:", f"{BARRED}:"): r"does not let this user in.*pg_hba.conf",
            re.sub(":[^:@]*@", f":{SECRET}@", url(sslmode="require")): r"refuses the user or the password",
        }.items():
            assert_start_fails(invoke, wrong, expected)


def test_a_server_without_tls_is_told_from_one_that_is_away(invoke: InvokeFunction, postgres_url: str) -> None:
    url = make_url(postgres_url).update_query_dict({"sslmode": "require"}).render_as_string(hide_password=False)
    assert_start_fails(invoke, url, "speaks no TLS, which sslmode in the URL asks for; turn it on there")


STRANGERS: dict[str, tuple[bytes, bytes, str]] = {
    "HTTP": (b"", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "it speaks HTTP"),
    "MySQL": (b"J\0\0\0\n8.0.35\0\x08\0\0\0abcdefgh\0\xff\xf7", b"", "it speaks the protocol of MySQL"),
    "MySQL that refuses": (b"E\0\0\0\xff\x6a\x04Host is not allowed", b"", "it speaks the protocol of MySQL"),
    "Redis": (b"", b"-ERR Protocol error: invalid bulk length\r\n", "it answers like Redis"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", b"", "it speaks SSH"),
    "mail": (b"220 mx ESMTP\r\n", b"", "it speaks SMTP or FTP"),
    "TLS": (b"", b"\x15\x03\x01\x00\x02\x02\x46", "it expects TLS from the first byte on; write sslnegotiation=direct"),
    "another": (b"", b"\0\0hello\0", "it speaks another protocol"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_server_that_is_no_postgres_is_named_by_its_protocol(
    invoke: InvokeFunction, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    greeting, answer, expected = STRANGERS[kind]
    # It answers at once, as far as this process, in which it runs, gets the time for it.
    monkeypatch.setattr("mcp_session_store.sql.dialects.strangers._LOOK_FOR", 30.0)

    class Stranger(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(greeting)
            if self.request.recv(64):
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"postgresql://app:{SECRET}@127.0.0.1:{server.server_address[1]}/d"
            assert_start_fails(invoke, url, f"what answers there is no Postgres server: {expected}.*correct the host")
            required = invoke("check", "--wait", "60", "--url", f"{url}?sslmode=require")
            assert required.exit_code == 1
            assert f"no Postgres server: {expected}" in required.stderr
            # Then asyncpg is only cut off.
            without_tls = invoke("check", "--wait", "60", "--url", f"{url}?sslmode=disable")
            assert f"no Postgres server: {expected}" in without_tls.stderr
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("option", ["sslrootcert", "sslcert", "sslkey"])
def test_a_file_that_the_url_names_is_asked_for_before_anything_starts(invoke: InvokeFunction, option: str) -> None:
    result = invoke("serve", TARGET, "--url", f"{UNREACHABLE}?sslmode=require&{option}=/nowhere/file.pem")
    assert result.exit_code == 2
    assert f"{option}='/nowhere/file.pem' in the database URL cannot be used: there is no such file" in result.output


def test_a_start_with_several_workers_fails_before_they_fork(command: CommandFunction, postgres_url: str) -> None:
    wrong = make_url(postgres_url).set(password=SECRET).render_as_string(hide_password=False)
    done = command("serve", TARGET, "--url", wrong, "--workers", "2", "--port", str(free_port()))
    assert done.returncode == 3
    assert done.stderr.startswith("Error: the database postgresql://")
    assert done.stderr.count("\n") == 1
    assert SECRET not in done.stderr
    assert done.stdout == ""
