"""The public names as servers and programs use them. Nothing here runs: mypy checks it, as it checks their code."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request

from mcp_session_store import (
    ConfigurationError,
    DurableSessionManager,
    EndHook,
    EndReason,
    EventLog,
    EventPolicy,
    InstanceSettings,
    InvalidValue,
    JournaledMethod,
    MemoryEventLog,
    MemorySessionStore,
    RestoreHook,
    RestoreRefused,
    RetentionPolicy,
    SchemaError,
    SessionRecord,
    SessionRestoreMarker,
    SessionStore,
    SessionStoreError,
    SqlEventLog,
    SqlSessionStore,
    StoreUnavailable,
    durable_app,
    get_restore_marker,
    migrations,
    run_durable,
    session_key,
)
from mcp_session_store.records import Changes, EventPage, Principal
from mcp_session_store.retention import EventSweepReport, SweepReport

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from alembic.runtime.environment import EnvironmentContext
    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import Context, MCPServer
    from sqlalchemy import Connection, MetaData

URL = "postgresql://user@host/database"


async def on_restore(marker: SessionRestoreMarker, record: SessionRecord) -> None:
    if record.client_name == "unwanted":
        raise RestoreRefused("this client is not served any more")
    assert_type(marker.session_id, str)
    assert_type(marker.created_at, datetime)
    assert_type(marker.restored_at, datetime)
    assert_type(marker.restores, int)
    assert_type(marker.previous_instance, str)
    assert_type(marker.replaying, bool)
    assert_type(marker.request, Request | None)


async def on_end(record: SessionRecord, reason: EndReason) -> None:
    assert_type(record.key, UUID)
    assert_type(record.expires_at, datetime | None)
    assert_type(record.principal, Principal | None)
    assert_type(reason, EndReason)


restore_hook: RestoreHook = on_restore
end_hook: EndHook = on_end


def apps(mcpserver: MCPServer[Any], lowlevel: Server[Any], fastmcp: FastMCP[Any], store: SessionStore) -> None:
    assert_type(durable_app(mcpserver), Starlette)
    assert_type(durable_app(lowlevel, "sqlite:///sessions.db"), Starlette)
    assert_type(durable_app(fastmcp, store, events=MemoryEventLog(MemorySessionStore())), Starlette)
    durable_app(
        mcpserver,
        URL,
        namespace="notes",
        schema=None,
        auto_upgrade=True,
        retention=RetentionPolicy(idle=timedelta(hours=8), absolute=None, per_principal=20),
        events=EventPolicy(max_age=timedelta(hours=1), max_events_per_session=10_000),
        on_restore=on_restore,
        on_end=on_end,
        settings=InstanceSettings(evict_after=60.0, max_sessions=None),
        journaled_methods=[JournaledMethod(method="notes/open", subject="name", undone_by="notes/close")],
    )
    durable_app(mcpserver, URL, events=True, evict_after=None, end_within=2.5)
    durable_app(
        mcpserver,
        create_async_engine(URL),
        retention=RetentionPolicy(idle="8h", absolute="none", tombstone="1d", unbound_state=timedelta(days=1)),
        events=EventPolicy(max_age="1h"),
    )
    assert_type(RetentionPolicy(idle="8h").idle, timedelta | None)
    assert_type(EventPolicy(max_age="1h").max_age, timedelta | None)
    RetentionPolicy(idle=8)  # type: ignore[arg-type]
    EventPolicy(max_events_per_session="none")  # type: ignore[arg-type]
    RetentionPolicy(idel="8h")  # type: ignore[call-arg]
    durable_app(mcpserver, events="yes")  # type: ignore[arg-type]
    durable_app(mcpserver, 5)  # type: ignore[arg-type]
    durable_app("server:app", URL)  # type: ignore[arg-type]
    durable_app(mcpserver, URL, on_end=on_restore)  # type: ignore[arg-type]
    run_durable(mcpserver)
    run_durable(fastmcp, URL, host="0.0.0.0", port=80, path="/mcp", json_response=True, log_level=None, events=True)
    run_durable(lowlevel, store, shutdown_timeout=30, namespace="notes")
    run_durable("server:app", URL)  # type: ignore[arg-type]
    run_durable(mcpserver, URL, port="80")  # type: ignore[arg-type]


async def manager(lowlevel: Server[Any], store: SessionStore) -> None:
    manager = DurableSessionManager(lowlevel, store, close_store=True)
    async with manager.run():
        pass


def tool(ctx: Context[Any]) -> str:
    marker = get_restore_marker(ctx)
    assert_type(marker, SessionRestoreMarker | None)
    return "" if marker is None else marker.session_id


async def stores(log: EventLog) -> None:
    async with SqlSessionStore(URL, namespace="notes") as store:
        assert_type(store, SqlSessionStore)
        assert_type(store.retention, RetentionPolicy)
        key = session_key("a session id")
        assert_type(key, UUID)
        assert_type(await store.load(key), SessionRecord | None)
        assert_type(await store.end(key, reason=EndReason.OPERATOR), bool)
        assert_type(await store.changes(None), Changes)
        assert_type(await store.sweep(), SweepReport)
        of_store: EventLog = SqlEventLog(store, policy=EventPolicy())
    of_engine: SessionStore = SqlSessionStore(create_async_engine(URL))
    assert_type(await log.read(key, "stream", after=0), EventPage | None)
    assert_type(await log.sweep(), EventSweepReport)
    del of_store, of_engine


async def hints(store: SessionStore) -> None:
    def on_hint(keys: Collection[UUID] | None) -> None: ...

    await store.listen(on_hint)


async def program() -> None:
    await migrations.upgrade(URL)
    await migrations.check(create_async_engine(URL), schema="sessions")
    assert_type(await migrations.current(URL), str | None)
    async with create_async_engine(URL).begin() as connection:
        await migrations.upgrade(connection, schema="sessions")
        await connection.run_sync(migrations.upgrade)


def migration_of_an_application(connection: Connection, context: EnvironmentContext) -> None:
    migrations.upgrade(connection)
    models: MetaData = migrations.metadata(schema="sessions")
    context.configure(connection=connection, target_metadata=models, include_name=migrations.include_name)


def errors() -> Sequence[type[SessionStoreError]]:
    return [ConfigurationError, InvalidValue, RestoreRefused, SchemaError, StoreUnavailable]
