"""What a store is made with, and what it makes of it."""

from __future__ import annotations

import asyncio
import gc
import shlex
import ssl
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import QueuePool

from mcp_session_store.errors import ConfigurationError, StoreClosed, StoreUnavailable
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.dialects import DIALECTS
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.dialects.postgres_options import driver_arguments
from mcp_session_store.sql.engine import checked_url, make_engine, shown_options, shown_url
from mcp_session_store.sql.failures import failure_kind, summary_of
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_session
from tests.support.databases import (
    connections_checked_out,
    engine_of,
    execute,
    kept_connections,
    settled,
    sql_store,
)
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("postgres://u:p@host/db", "postgresql+asyncpg://u:p@host/db"),
        ("postgresql://u:p@host:5433/db", "postgresql+asyncpg://u:p@host:5433/db"),
        ("postgresql+asyncpg://host/db", "postgresql+asyncpg://host/db"),
        ("postgresql://host/db?sslmode=require", "postgresql+asyncpg://host/db?sslmode=require"),
        ("postgresql://host/db?ssl=require", "postgresql+asyncpg://host/db?sslmode=require"),
        ("postgresql://host/db?connection_limit=3", "postgresql+asyncpg://host/db?pool_size=3"),
        ("postgresql:///db?user=u&password=p", "postgresql+asyncpg://u:p@/db"),
        (
            "postgresql://u:p@h1:5433,h2/db?target_session_attrs=read-write",
            "postgresql+asyncpg://u:p@/db?host=h1%3A5433&host=h2%3A5432&target_session_attrs=read-write",
        ),
        (" postgresql://host/db\n", "postgresql+asyncpg://host/db"),
        ("\t\r\npostgresql://host/db?sslmode=require\r\n\n", "postgresql+asyncpg://host/db?sslmode=require"),
        ("\u00a0postgres://host/db\u2028", "postgresql+asyncpg://host/db"),
        ("\fsqlite:////sessions.db \v", "sqlite+aiosqlite:////sessions.db"),
        # As editors and web pages leave it.
        ("\ufeffpostgresql://host/db\r\n", "postgresql+asyncpg://host/db"),
        ("postgresql://host/db \u200b\n", "postgresql+asyncpg://host/db"),
        # As providers give them: Neon's pooler, Supabase's, Heroku's, Aiven's, Cloud SQL's, and Prisma's.
        (
            "postgresql://u:p@ep-a-pooler.aws.neon.tech/db?sslmode=require&channel_binding=prefer",
            "postgresql+asyncpg://u:p@ep-a-pooler.aws.neon.tech/db?channel_binding=prefer&sslmode=require",
        ),
        (
            "postgres://postgres.ref:p@aws-0.pooler.supabase.com:6543/postgres?pgbouncer=true&connection_limit=1"
            "&supa=base-pooler.x",
            "postgresql+asyncpg://postgres.ref:p@aws-0.pooler.supabase.com:6543/postgres?pgbouncer=true&pool_size=1"
            "&supa=base-pooler.x",
        ),
        ("postgres://u:p@host:25060/db?sslmode=require", "postgresql+asyncpg://u:p@host:25060/db?sslmode=require"),
        (
            "postgres://u:p@pg.aivencloud.com:12691/db?sslmode=require&uselibpqcompat=true&workaround=supabase-pooler",
            "postgresql+asyncpg://u:p@pg.aivencloud.com:12691/db?sslmode=require&uselibpqcompat=true"
            "&workaround=supabase-pooler",
        ),
        (
            "postgresql://u:p@crdb.cockroachlabs.cloud:26257/db?sslmode=verify-full&options=--cluster%3Da-1",
            "postgresql+asyncpg://u:p@crdb.cockroachlabs.cloud:26257/db?options=--cluster%3Da-1&sslmode=verify-full",
        ),
        (
            "postgres://u:p@app-db.flycast:5432/app?sslmode=disable",
            "postgresql+asyncpg://u:p@app-db.flycast:5432/app?sslmode=disable",
        ),
        (
            "postgres://admin%40srv:p@srv.postgres.database.azure.com/postgres?sslmode=require",
            "postgresql+asyncpg://admin%40srv:p@srv.postgres.database.azure.com/postgres?sslmode=require",
        ),
        (
            "postgresql://u:p@/db?host=/cloudsql/p:r:i",
            "postgresql+asyncpg://u:p@/db?host=%2Fcloudsql%2Fp%3Ar%3Ai",
        ),
        (
            "postgresql://u:p@host/db?connect_timeout=10&keepalives=1&keepalives_idle=30&application_name=a+b",
            "postgresql+asyncpg://u:p@host/db?application_name=a+b&connect_timeout=10&keepalives=1&keepalives_idle=30",
        ),
        (
            "postgresql://u:p@host/db?pool_timeout=10&tcp_user_timeout=5&sslsni=1&fallback_application_name=x",
            "postgresql+asyncpg://u:p@host/db?application_name=x&pool_timeout=10&sslsni=1&tcp_user_timeout=5",
        ),
        ("sqlite:////sessions.db\n", "sqlite+aiosqlite:////sessions.db"),
        ("postgresql://host/db?pgbouncer=true", "postgresql+asyncpg://host/db?pgbouncer=true"),
        ("sqlite:///sessions.db", f"sqlite+aiosqlite:///{Path.cwd()}/sessions.db"),
        ("sqlite:////var/lib/sessions.db", "sqlite+aiosqlite:////var/lib/sessions.db"),
        # libpq: an empty value stands for the default.
        ("postgresql://u:p@host/db?sslmode=", "postgresql+asyncpg://u:p@host/db"),
        (
            "postgres://host/db?ssl=&pool_size=&pgbouncer=&host=&port=&user=&options=&connect_timeout=5",
            "postgresql+asyncpg://host/db?connect_timeout=5",
        ),
        ("sqlite+aiosqlite:////sessions.db", "sqlite+aiosqlite:////sessions.db"),
        # libpq: the folder of a socket as the host.
        (
            "postgresql://u:p@%2Frun%2Fa%20b/db?sslmode=prefer",
            "postgresql+asyncpg://u:p@/db?host=%2Frun%2Fa+b&sslmode=prefer",
        ),
        ("postgresql://%2frun", "postgresql+asyncpg://?host=%2Frun"),
    ],
)
def test_a_url_gets_the_driver_of_this_package(given: str, made: str) -> None:
    url, _ = checked_url(given)
    assert url.render_as_string(hide_password=False) == made


def test_a_relative_path_of_sqlite_is_made_absolute_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder, 100%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    url, _ = checked_url("sqlite:///s.db")
    as_uri, _ = checked_url("sqlite:///file:s.db?uri=true")
    given = create_async_engine("sqlite+aiosqlite:///s.db")
    shown = [shown_url(url), shown_url(given.url)]
    monkeypatch.undo()
    assert url.database == str(folder / "s.db")
    # SQLite decodes a URI.
    assert as_uri.database == f"file:{tmp_path}/a%20folder%2C%20100%25/s.db"
    assert [checked_url(text)[0].database for text in shown] == [str(folder / "s.db")] * 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:hunter2@host/db", "postgresql://"),
        ("postgresql+psycopg://u:hunter2@host/db", r"postgresql\+asyncpg://"),
        ("sqlite+pysqlite:///x.db", r"sqlite\+aiosqlite://"),
        ("no url hunter2", "cannot be read"),
        ("postgresql://u:hunter2@host:hunter2/db", "cannot be read"),
        ("postgresql://u:hunter2@host/db?colour=blue", "colour"),
        ("postgresql://u:hunter2@host/db?pgbouncer=yes", "pgbouncer='yes' .* true or false"),
        ("postgresql://u:hunter2@host/db?pgbouncer=true&pgbouncer=false", "pgbouncer twice"),
        ("postgresql://u:hunter2@host/db?ssl=require&sslmode=disable", "ssl(mode)? and ssl(mode)?, which are the same"),
        ("postgresql://u:hunter2@host/db?sslmode=disable&ssl=require", "ssl(mode)? and ssl(mode)?, which are the same"),
        ("postgresql://u:hunter2@host/db?ssl=true", "ssl='true' .* verify-ca or verify-full"),
        ("postgresql://u:hunter2@host/db?sslmode=no-verify", "sslmode='no-verify' .* verify-ca or verify-full"),
        ("postgresql://u:hunter2@host/db?sslmode=require&sslrootcert=system", "write sslmode=verify-full"),
        ("postgresql://u:hunter2@host/db?statement_cache_size=off", "statement_cache_size='off' .* whole number"),
        ("postgresql://u:hunter2@host/db?connection_limit=0", "connection_limit='0' .* of 1 or more"),
        ("postgresql://u:hunter2@h1,h2/db?target_session_attrs=standby", "any, primary or read-write"),
        (
            "postgresql://u:hunter2@host/db?sslmode=require&channel_binding=require",
            "='require' .* remove",
        ),
        ("postgresql://u:hunter2@host/db?gssencmode=require", "gssencmode='require' .* remove it"),
        ("postgresql://u:hunter2@host/db?schema=app", "option schema, .* --schema"),
        ("postgresql://u:hunter2@host/db?currentSchema=app", "option currentSchema, .* options=-csearch_path"),
        ("postgresql://u:hunter2@host/db?SSLMODE=require", "option SSLMODE, .*; write sslmode$"),
        ("postgresql://u:hunter2@host/db?sslMode=require", "option sslMode, .*; write sslmode$"),
        ("postgresql://u:hunter2@host/db?sslmode=require&amp;connect_timeout=3", "; write connect_timeout$"),
        ("postgresql://u:hunter2@host/db?prepareThreshold=0", "option prepareThreshold, .* pgbouncer=true"),
        ("postgresql://u:hunter2@host/db?statement_timeout=5000", "option statement_timeout, .*%3D30s, or remove it"),
        ("postgresql://u:hunter2@host/db?pool_size=5&max_overflow=10", "option max_overflow, .* pool_size is"),
        ("postgresql://u:hunter2@host/db?uselibpqcompat=false", "uselibpqcompat='false' .* write true"),
        ("postgresql://u:hunter2@host/db?connect_timeout=30m", "connect_timeout='30m' .* whole number of 0"),
        ("postgresql://u:hunter2@host/db?connect_timeout=1_000", "connect_timeout='1_000' .* whole number of 0"),
        ("postgresql://u:hunter2@host/db?pool_size=\u221e", "pool_size='\u221e' .* whole number of 1"),
        ("postgresql://u:hunter2@host/db # the database", "followed by a comment.* remove it"),
        ("postgresql://u:hunter2@host/db?sslmode=require\t#prod", "followed by a comment.* remove it"),
        ("sqlite:///sessions.db  # the database", "followed by a comment.* remove it"),
        ("`postgresql://u:hunter2@host/db`", "in quotes"),
        ("\u201cpostgresql://u:hunter2@host/db\u201d", "in quotes"),
        ("postgresql://u:hunter2@host/db?passfile=~/.pgpass", "passfile='~/.pgpass' .* no such file"),
        ("postgresql://u:hunter2@host/db?search_path=app", "option search_path, .* options=-csearch_path"),
        ("postgresql://u:hunter2@/db?host=a,b&port=1,2,3", "hosts and ports .* cannot be read"),
        ("postgresql://u:hunter2@h1:hunter2,h2/db", "hosts and ports .* cannot be read"),
        ("postgresql://u:hunter2@h1,/db", "hosts and ports .* cannot be read"),
        ("postgresql://u:hunter2@host:99999/db", "port 99999 .* from 1 to 65535"),
        ("postgresql://u:hunter2@host:0/db", "port 0 .* from 1 to 65535"),
        ("postgresql://u:hunter2@:0/db", "port 0 .* from 1 to 65535"),
        ("sqlite:///file:s.db", r"begins with file: .*\?uri=true, or only the path"),
        ("sqlite:///file:/var/s.db?uri=false", r"begins with file: .*\?uri=true, or only the path"),
        (
            "postgresql://u:hunter2@host/db?sslkey=-----BEGIN KEY-----%0Ahunter2",
            "sslkey .* write its content to a file",
        ),
        (f"postgresql://u:hunter2@host/db?sslcert={'hunter2' * 50}", "sslcert .* write its content to a file"),
        ("'postgresql://u:hunter2@host/db'", "in quotes"),
        ("postgresql://u:hunter2@host\n:5432/db", "on one line"),
        ("postgresql://u:hunter2\nhunter2@host/db", "on one line"),
        ("postgresql://u:hunter2@host /db", "on one line"),
        ("postgresql://u:hunter2@host/db?sslmode", "option sslmode without a value; write name=value"),
        ("postgresql://u:hunter2@host/db?hunter2", "an option without a value"),
        ("postgresql://u:hunter2@host/db?colour=", "colour"),
        ("postgresql://u:hunter2@host/db?sslmode=&sslmode=require", "sslmode twice"),
        ("sqlite:///s.db?uri=", "uri='' .* true or false"),
        ("sqlite:///s.db?uri", "option uri without a value"),
        ("postgresql://u:hunter2@host/db?ssl=1", "ssl='1' .* verify-ca or verify-full"),
        ("postgresql://u:hunter2@host/db?sslmode=Require", "sslmode='Require' .* verify-ca or verify-full"),
        ("postgresql://u:hunter2@host/db?sslmode=require%20", "sslmode='require ' .* verify-ca or verify-full"),
        ("postgresql://u:hunter2@host/db?connect_timeout=5s", "connect_timeout='5s' .* whole number of 0"),
        ("postgresql://u:hunter2@host/db?pool_size=-1", "pool_size='-1' .* whole number of 1"),
        ("postgresql://u:hunter2@host/db?statement_cache_size=%EF%BC%91", "statement_cache_size=.* whole number"),
        ("postgresql://u:hunter2@host/db?direct_tls=yes", "direct_tls='yes' .* true or false"),
        ("postgresql://u:hunter2@host/db?ssl_min_protocol_version=1.2", "='1.2' .* TLSv1.2 or TLSv1.3"),
        ("postgresql://u:hunter2@host/db?port=https", "port='https' .* whole number of 1"),
        ("postgresql://u:hunter2@h1,h2/db?target_session_attrs=primary,any", "any, primary or read-write"),
        ("postgresql://u:hunter2@host/db?application_name=a%00b", "NUL character"),
        ("postgresql://u:hunter2%00@host/db", "NUL character"),
        ("postgresql://u@host/db&password=hunter2", r"without a \? between them"),
        ("postgresql://u@host/db;sslmode=require;password=hunter2", r"without a \? between them"),
        ("jdbc:postgresql://host/db?user=u&password=hunter2", "cannot be read"),
        ("psql 'postgresql://u:hunter2@host/db'", "cannot be read"),
        ("DATABASE_URL=postgresql://u:hunter2@host/db", "cannot be read"),
        ("postgresql://u:hunter2@[::1/db", "cannot be read"),
        ('"postgresql://u:hunter2@host/db" ', "in quotes"),
        ("postgresql://u:hunter2@host/db\r\npostgresql://u:hunter2@other/db", "not percent-encoded|on one line"),
        ("postgresql://u:hunter2@ho\tst/db", "on one line"),
        ("postgresql://u:hunter2@host/d\x00b", "on one line"),
        ("sqlite:///s.db?cached_statements=99999999999999999999", "cached_statements='9+' .* whole number"),
        ("sqlite:///s.db?uri=TRUE", "uri='TRUE' .* true or false"),
        ("sqlite:///file:s.db?uri=true&nolock=2", "nolock='2' .* 0 or 1"),
        ("sqlite://", "MemorySessionStore"),
        ("sqlite://hunter2.db", "three slashes"),
        ("sqlite:///s.db?timeout=abc", "option timeout, .* --timeout"),
        ("sqlite:///s.db?mode=rwc", "option mode, .*uri=true"),
        ("sqlite:///s.db?uri=yes", "uri='yes' .* true or false"),
        ("sqlite:///file:s.db?uri=true&mode=ro", "mode='ro' .* rw or rwc"),
        ("sqlite:///s.db?cached_statements=many", "cached_statements='many' .* whole number"),
        ("sqlite:///s.db?journal=off", "option journal, "),
        ("sqlite:///", "MemorySessionStore"),
        ("sqlite:///:memory:", "MemorySessionStore"),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", "MemorySessionStore"),
        ("sqlite+aiosqlite:///file:x?mode=memory&uri=true", "MemorySessionStore"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_the_remedy_and_without_the_password(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as failure:
        SqlSessionStore(url)
    assert "hunter2" not in str(failure.value)
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__ or failure.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1.0}, r"timeout=-1\.0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"namespace": ""}, "namespace=''"),
        ({"namespace": None}, "namespace=None"),
        ({"schema": "sessions"}, "sqlite has no schemas"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SqlSessionStore("sqlite:///sessions.db", **options)


@pytest.mark.parametrize("schema", ["", "x" * 64, "a\0b"])
def test_a_schema_that_is_no_name_is_refused(schema: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a schema"):
        SqlSessionStore("postgresql://host/db", schema=schema)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (lambda: sa.create_engine("sqlite:///x.db"), "create_async_engine"),
        (lambda: object(), "must be a database URL or an AsyncEngine"),
        (lambda: None, "must be a database URL or an AsyncEngine"),
        (lambda: create_async_engine("sqlite+aiosqlite:///:memory:"), "MemorySessionStore"),
        (
            lambda: create_async_engine(
                "postgresql+asyncpg://host/db", execution_options={"schema_translate_map": {None: "sessions"}}
            ),
            "by schema= instead",
        ),
    ],
    ids=["not async", "no engine", "nothing", "in memory", "another schema"],
)
def test_an_engine_that_cannot_work_is_refused(engine: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SqlSessionStore(engine())


@pytest.mark.parametrize("password", ["first@hunter2", "p@hunter2/w#hunter2:%?", "a/hunter2", "a?hunter2=x"])
def test_no_part_of_a_password_that_is_not_encoded_is_shown(password: str) -> None:
    text = f"postgresql://app:{password}@db.invalid:5432/d?sslmode=require"
    with pytest.raises(ConfigurationError, match="not percent-encoded") as failure:
        SqlSessionStore(text)
    assert "hunter2" not in str(failure.value)
    assert failure.value.__cause__ is None


@pytest.mark.parametrize("password", ["first@hunter2", "p@hunter2/w#hunter2:%?", "hunter1@x/hunter2"])
def test_no_part_of_a_password_is_shown_of_a_url_that_was_parsed_elsewhere(password: str) -> None:
    parsed = make_url(f"postgresql+asyncpg://app:{password}@db.invalid:5432/d")
    with pytest.raises(ConfigurationError, match="not percent-encoded") as failure:
        SqlSessionStore(parsed)
    assert "hunter2" not in str(failure.value)
    assert "hunter2" not in repr(SqlSessionStore(create_async_engine(parsed)))


def test_a_user_name_is_shown_only_when_it_is_plain() -> None:
    assert (
        shown_url(checked_url("postgresql://postgres.project-1:p@host/d")[0])
        == "postgresql://postgres.project-1@host/d"
    )
    assert shown_url(checked_url("postgresql://app%3Ahunter2@host/d")[0]) == "postgresql://***@host/d"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://app:p@/d?host=/cloudsql/p:r:i", "postgresql://app@/d?host=/cloudsql/p%3Ar%3Ai"),
        ("postgresql://app:p@/d?host=/run/pg&port=5433", "postgresql://app@/d?host=/run/pg&port=5433"),
        ("postgresql://app:p@pooler:6432/d?pgbouncer=true", "postgresql://app@pooler:6432/d?pgbouncer=true"),
        ("postgresql://app:p@h1,h2:5433/d", "postgresql://app@h1:5432,h2:5433/d"),
        ("postgresql://app:p@[::1]:5433/d", "postgresql://app@[::1]:5433/d"),
        ("postgresql://app:p@[::1],[::2]:5433/d", "postgresql://app@/d?host=%3A%3A1%2C%3A%3A2&port=5432%2C5433"),
        ("postgresql://app:p@h1,[::2]:5433/d", "postgresql://app@/d?host=h1%2C%3A%3A2&port=5432%2C5433"),
        ("postgresql://app:p@h/d?sslkey=k.pem&sslpassword=hunter2", "postgresql://app@h/d?sslkey=k.pem"),
        ("sqlite:////var/lib/x.db?cached_statements=8", "sqlite:////var/lib/x.db?cached_statements=8"),
        ("postgresql://app:p@h/a%2Fb%23c%3Fd%25", "postgresql://app@h/a/b%23c%3Fd%25"),
        ("postgresql://app:p@h/a%26b%3Dc", "postgresql://app@h/a%26b%3Dc"),
        ("postgresql://app:p@/d?host=/run/a,/run/b&port=1,2", "postgresql://app@/d?host=/run/a%2C/run/b&port=1%2C2"),
        (
            "postgresql://app:p@h/d?options=-csearch_path%3Da%20-cx%3D1",
            "postgresql://app@h/d?options=-csearch_path%3Da+-cx%3D1",
        ),
        (
            "postgresql://app:p@h1,h2/a%20b:c?sslmode=require",
            "postgresql://app@h1:5432,h2:5432/a b%3Ac?sslmode=require",
        ),
        ("sqlite:////var/a b%25/%3F#.db", "sqlite:////var/a b%25/%3F%23.db"),
        ("postgresql://app:p@:5433/d", "postgresql://app@:5433/d"),
        ("postgresql://app:p@:5433/d?host=/run/pg", "postgresql://app@:5433/d?host=/run/pg"),
        ("postgresql://app:p@%2Frun%2Fpg:5433/d", "postgresql://app@/d?host=/run/pg&port=5433"),
    ],
)
def test_a_printed_command_reaches_the_database_that_it_is_about(given: str, shown: str) -> None:
    url, _ = checked_url(given)
    [option, value] = shlex.split(shown_options(url, None))
    assert (option, value) == ("--url", shown)
    again, _ = checked_url(value)
    assert (again.username, again.host, again.port) == (url.username, url.host, url.port)
    assert again.database == url.database
    assert again.query == url.difference_update_query({"sslpassword"}).query


async def test_options_of_libpq_reach_the_server(postgres_url: str) -> None:
    url = make_url(postgres_url).update_query_dict(
        {
            "options": "-csearch_path=elsewhere -cwork_mem=5MB",
            "sslmode": "prefer",
            "connect_timeout": "10",
            "keepalives": "1",
            "fallback_application_name": "mine",
        }
    )
    engine = make_engine(*checked_url(url), timeout=5)
    try:
        async with engine.connect() as connection:
            settings = [
                (await connection.exec_driver_sql(f"SHOW {name}")).scalar()
                for name in ("search_path", "work_mem", "application_name")
            ]
        assert settings == ["elsewhere", "5MB", "mine"]
    finally:
        await engine.dispose()


async def test_a_list_of_hosts_is_tried_in_order(postgres_url: str) -> None:
    url = make_url(postgres_url)
    hosts = f"127.0.0.1:{free_port()},{url.host}:{url.port}"
    text = url.render_as_string(hide_password=False).replace(f"{url.host}:{url.port}", hosts)
    async with sql_store(f"{text}?target_session_attrs=read-write") as store:
        assert await store.load(uuid.uuid4()) is None


def test_options_without_an_effect_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        SqlSessionStore("postgresql://host/db?keepalives=1&channel_binding=prefer&sslmode=")
    assert "the option sslmode of the database URL is left out: it is empty" in caplog.text
    assert "the option keepalives of the database URL is left out" in caplog.text
    assert "the option channel_binding of the database URL is left out" in caplog.text


def test_the_certificates_that_the_system_trusts_verify_the_server() -> None:
    arguments = driver_arguments({"host": "h", "sslmode": "verify-full", "sslrootcert": "system"})
    assert arguments["ssl"].check_hostname
    assert arguments["ssl"].verify_mode is ssl.CERT_REQUIRED
    assert "dsn" not in arguments


def test_a_shown_url_has_no_password_no_driver_and_no_options() -> None:
    url, _ = checked_url("postgresql://user:hunter2@host:5433/db?passfile=hunter2")
    assert shown_url(url) == "postgresql://user@host:5433/db"


async def test_an_engine_of_ours_waits_for_nothing_longer_than_the_timeout(postgres_url: str) -> None:
    # Time enough for a busy machine to connect.
    async with sql_store(postgres_url, timeout=3) as store:
        engine = engine_of(store)
        assert engine.sync_engine.hide_parameters
        async with asyncio.timeout(20):
            async with engine.connect() as connection:
                with pytest.raises(TimeoutError):
                    await connection.exec_driver_sql("SELECT pg_sleep(3600)")
                await connection.invalidate()


async def test_operators_can_tell_the_connections_of_a_store(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store:
        await store.load(uuid.uuid4())
        rows = await execute(postgres_url, "SELECT DISTINCT application_name FROM pg_stat_activity")
        assert ("mcp-session-store",) in [tuple(row) for row in rows]


@pytest.mark.parametrize(("option", "prepares"), [("true", False), ("false", True), (None, True)])
async def test_behind_pgbouncer_a_store_prepares_no_statements(
    postgres_url: str, option: str | None, prepares: bool
) -> None:
    url = postgres_url if option is None else f"{postgres_url}?pgbouncer={option}"
    async with sql_store(url) as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
        await settled(store)
        rows = [
            await connection.fetch("SELECT statement FROM pg_prepared_statements")
            for connection in await kept_connections(store)
        ]
        prepared = ["clock_timestamp" in row["statement"] for found in rows for row in found]
        assert any(prepared) == prepares


async def test_a_prepared_statement_that_is_gone_is_answered_with_what_to_do_behind_pgbouncer(
    postgres_url: str,
) -> None:
    async with sql_store(postgres_url) as store:
        await store.load(uuid.uuid4())
        await settled(store)
        # As when PgBouncer puts another server connection in the place of the one before.
        for connection in await kept_connections(store):
            await connection.execute("DEALLOCATE ALL")
        with pytest.raises(StoreUnavailable, match=r"InvalidSQLStatementNameError: .*\?pgbouncer=true"):
            await store.load(uuid.uuid4())


@pytest.mark.parametrize("kind", [asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError])
def test_both_errors_of_a_pooled_prepared_statement_name_the_remedy(kind: type[asyncpg.PostgresError]) -> None:
    error = kind('prepared statement "__asyncpg_stmt_1__" is not what it was')
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.UNAVAILABLE
    assert "?pgbouncer=true" in summary_of(error, DIALECTS["postgresql"])


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("got result for unknown protocol state"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_connection_that_the_driver_itself_finds_in_a_wrong_state_is_broken(error: Exception) -> None:
    """As it is raised where SQLAlchemy makes a new connection ready, and where statements go to the driver."""
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.BROKEN


def test_a_connection_that_aiosqlite_is_closing_is_broken() -> None:
    assert failure_kind(ValueError("Connection closed"), DIALECTS["sqlite"]) is FailureKind.BROKEN
    assert failure_kind(ValueError("embedded null character"), DIALECTS["sqlite"]) is FailureKind.INVALID_VALUE


def test_a_value_that_the_driver_cannot_send_is_an_invalid_value() -> None:
    error = asyncpg.DataError("invalid input for query argument $1")
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.INVALID_VALUE


async def test_a_given_engine_is_used_and_not_disposed(database_url: str) -> None:
    await migrate.upgrade(database_url)
    engine = create_async_engine(database_url)
    async with SqlSessionStore(engine) as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
        await settled(store)
        assert engine_of(store) is engine
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedin() > 0
    async with engine.connect() as connection:
        assert (await connection.execute(sa.text("SELECT count(*) FROM mcp_session"))).scalar_one() == 1
        # Nobody else finds the store's isolation level on the connection.
        assert await connection.get_isolation_level() != "AUTOCOMMIT"
    await engine.dispose()


async def test_on_a_given_engine_no_pragma_is_set(sqlite_url: str) -> None:
    await migrate.upgrade(sqlite_url)
    engine = create_async_engine(sqlite_url)
    async with engine.connect() as connection:
        before = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    async with SqlSessionStore(engine) as store:
        await store.create(new_session())
        await settled(store)
        async with engine.connect() as connection:
            after = [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
    assert before == after
    assert before[0] == "delete"
    await engine.dispose()


async def test_an_engine_of_ours_writes_ahead_and_syncs_normally(sqlite_url: str) -> None:
    async with sql_store(sqlite_url) as store, engine_of(store).connect() as connection:
        pragmas = {
            name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
        assert pragmas == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1}


async def test_a_given_engine_whose_connections_are_all_in_use_makes_the_store_unavailable(
    database_url: str,
) -> None:
    await migrate.upgrade(database_url)
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    store = SqlSessionStore(engine, timeout=10)
    async with engine.connect():
        with pytest.raises(StoreUnavailable):
            await store.load(uuid.uuid4())
    assert await store.load(uuid.uuid4()) is None
    await store.aclose()
    await engine.dispose()


async def test_a_pool_of_one_connection_serves_all_kinds_of_calls(database_url: str) -> None:
    await migrate.upgrade(database_url)
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    async with SqlSessionStore(engine) as store:
        for _ in range(5):
            sessions = [new_session() for _ in range(20)]
            await asyncio.gather(*map(store.create, sessions))
            calls = [
                *(store.load(session.key) for session in sessions),
                *(store.claim(session.key, instance="b", restores=0) for session in sessions),
                *map(store.create, [new_session() for _ in range(20)]),
            ]
            assert None not in await asyncio.gather(*calls)
        await settled(store)
    await engine.dispose()


async def test_a_closed_store_refuses_calls_until_it_is_opened_again(database_url: str) -> None:
    await migrate.upgrade(database_url)
    store = SqlSessionStore(database_url)
    session = new_session()
    await store.create(session)
    await store.aclose()
    assert connections_checked_out(store) == 0
    with pytest.raises(StoreClosed, match=r"open\(\)"):
        await store.load(session.key)
    await store.open()
    assert await store.load(session.key) is not None
    await store.aclose()


def test_a_store_that_is_used_in_a_second_event_loop_says_so(sqlite_url: str) -> None:
    store = SqlSessionStore(sqlite_url)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(store.open())
        with pytest.raises(ConfigurationError, match="event loop"):
            second.run(store.load(uuid.uuid4()))
        first.run(store.aclose())
        second.run(store.open())
        assert second.run(store.load(uuid.uuid4())) is None
        second.run(store.aclose())


# Of connections whose event loop has ended nothing can be asked any more, not even to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_is_closed_in_another_event_loop_when_the_first_has_ended(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(migrate.upgrade(database_url))
    # What asyncio says of tasks of earlier tests is said now.
    gc.collect()
    caplog.clear()

    def use_and_close(store: SqlSessionStore) -> None:
        async def use() -> None:
            await store.open()
            session = await store.create(new_session())
            assert None not in await asyncio.gather(*(store.load(session.key) for _ in range(20)))
            # A connection that is just being given back would be cancelled with the loop, and its pool logs that.
            await settled(store)

        asyncio.run(use())
        asyncio.run(store.aclose())

    store = SqlSessionStore(database_url)
    use_and_close(store)
    use_and_close(store)
    use_and_close(SqlSessionStore(create_async_engine(database_url)))
    del store
    gc.collect()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
