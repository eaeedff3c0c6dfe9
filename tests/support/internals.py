"""Private members of the product that tests need: the one module of the tests that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_session_store.adapter import stopping
from mcp_session_store.sql.batching import Batcher
from mcp_session_store.sql.connections import Connections, PoolOfEngine
from mcp_session_store.sql.listening import Listening
from mcp_session_store.sql.notifications import SESSION_CHANNEL, Listener

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Hashable, Mapping
    from contextlib import AsyncExitStack
    from uuid import UUID

    import anyio
    import pytest
    from fastmcp import FastMCP
    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.context import ServerRequestContext
    from mcp.server.streamable_http import StreamableHTTPServerTransport
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from mcp.shared.dispatcher import Outbound
    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store import DurableSessionManager, MemoryEventLog, MemorySessionStore
    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.outage import Gate
    from mcp_session_store.adapter.question_ids import QuestionIds
    from mcp_session_store.adapter.relay.relay import Relay
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.changes import ChangeWatch
    from mcp_session_store.adapter.sessions.departures import Departures
    from mcp_session_store.adapter.sessions.ending import Ender
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.streams.event_ids import EventIds
    from mcp_session_store.adapter.streams.recorder import EventRecorder
    from mcp_session_store.adapter.streams.turns import Turns
    from mcp_session_store.memory.data import Log, Row
    from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore, SqlStateStore
    from mcp_session_store.sql.database import Database


# Of stores in memory


def rows_of(store: MemorySessionStore) -> dict[UUID, Row]:
    """The sessions that a store in memory holds, by their keys."""
    return store.data.rows


def is_listened_to(store: MemorySessionStore) -> bool:
    """Whether an instance listens for the changes of a store in memory."""
    return store.data.listeners != []


def logs_of(log: MemoryEventLog) -> dict[UUID, Log]:
    """The events that a log in memory holds, by the keys of their sessions."""
    return log.data.logs


# Of stores in a database


def database_of(store: SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore) -> Database:
    """The way of a store, a log or a mailbox to its database."""
    return store._database


def drains_of(store: SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore) -> list[asyncio.Task[None]]:
    """The running tasks of all batchers of a store, a log or a mailbox, which has some."""
    batchers = [value for value in vars(store).values() if isinstance(value, Batcher)]
    assert batchers
    return [batcher._drain_task for batcher in batchers if batcher._drain_task is not None]


def listening_of(store: SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore) -> set[asyncio.Task[None]]:
    """The tasks that listen for a store or a log, and those that are closing their connections."""
    return store._listener._listening.tasks


def listen_anew(store: SqlSessionStore, **options: Any) -> None:
    """Have a store listen anew, with these options."""
    store._listening = Listening(store._database, **options)
    store._listener = Listener(store._listening)


def channel_name() -> str:
    """The channel of changes, by the name that Postgres knows."""
    return SESSION_CHANNEL.name


def pool_size_of(store: SqlSessionStore) -> int:
    """The number of connections for queries that a store may have."""
    assert isinstance(store._database.connections, Connections)
    return store._database.connections._most


def idle_connections_of(database: Database) -> list[AsyncConnection]:
    """The connections that a database keeps open, and no call uses."""
    assert isinstance(database.connections, Connections)
    return database.connections._idle


def opening_of(database: Database) -> list[asyncio.Task[None]]:
    """The task that opens one more connection for queries, if one does."""
    opening = database.connections._opening if isinstance(database.connections, Connections) else None
    return [] if opening is None else [opening]


def waits_of(pool: PoolOfEngine) -> int:
    """The number of waits for a connection that a pool remembers."""
    return len(pool._waiting)


async def trim_waiting(log: SqlEventLog, key: UUID) -> None:
    """Remove events of a session that is over its bounds, as an append does: waiting for other transactions."""
    await log._chores.run(lambda attempt: log._trimming.trim(attempt, [key], limit=10, wait=True))


# Of the adapter


def tag_of(ids: EventIds, payload: bytes) -> bytes:
    """The tag that makes a payload an event id of a session."""
    return ids._tag(payload)


def exit_stack_of(ctx: ServerRequestContext[Any, Any]) -> AsyncExitStack:
    """The exit stack of the SDK's connection that a request came on."""
    return ctx.session._connection.exit_stack


def outbound_of(ctx: ServerRequestContext[Any, Any]) -> Outbound:
    """What sends requests and notifications on the standalone stream of the SDK's connection that a request came on."""
    return ctx.session._connection.outbound


def registry_of(manager: DurableSessionManager) -> Registry:
    """The registry of the sessions in a manager's memory."""
    return manager._registry


def stopping_in(manager: DurableSessionManager) -> Mapping[str, ResidentSession]:
    """The evicted copies whose server tasks have not ended yet, by session id."""
    return manager._registry._stopping


def resident_of(manager: DurableSessionManager, session_id: str) -> ResidentSession:
    """The resident copy of a session, which has to be there."""
    session = manager._registry.get(session_id)
    assert session is not None
    return session


def max_initialize_params_of(manager: DurableSessionManager) -> int:
    """Bytes of `initialize` params that a manager stores."""
    return manager._settings.max_initialize_params


def departures_of(manager: DurableSessionManager) -> Departures:
    """What watches the clients that wait for the JSON responses of a manager."""
    assert manager._departures is not None
    return manager._departures


def ender_of(manager: DurableSessionManager) -> Ender:
    """What ends the sessions of a running manager."""
    return manager._ender


def changes_of(manager: DurableSessionManager) -> ChangeWatch:
    """What learns of the changes that others make to the sessions of a running manager."""
    return manager._ender.changes


def has_polled(manager: DurableSessionManager) -> bool:
    """Whether a manager has polled for changes."""
    return manager._ender.changes._since is not None


def notify_of_changes(manager: DurableSessionManager) -> None:
    """Notify a manager that any sessions may have changed."""
    manager._ender.changes._on_notification(None)


def transports_in(manager: StreamableHTTPSessionManager) -> dict[str, StreamableHTTPServerTransport]:
    """The SDK's own table of what is in a manager's memory."""
    return manager._server_instances


def owners_in(manager: DurableSessionManager) -> dict[str, AuthorizationContext]:
    """The SDK's own table of the principals of what is in a manager's memory."""
    return manager._session_owners


async def discard_session(
    manager: DurableSessionManager, session_id: str, transport: StreamableHTTPServerTransport
) -> None:
    """Discard a session as the SDK does."""
    await manager._discard_session(session_id, transport)


def relay_of(manager: DurableSessionManager) -> Relay:
    """What relays the messages of a running manager, which has to have a mailbox."""
    assert manager._relay is not None
    return manager._relay


def outbox_size(manager: DurableSessionManager) -> int:
    """Number of messages to other instances that a running manager keeps."""
    return len(relay_of(manager).outbox._waiting)


def outbox_is_empty(manager: DurableSessionManager) -> bool:
    """Whether all messages of a running manager to other instances are posted."""
    return outbox_size(manager) == 0


def activity_of(manager: DurableSessionManager) -> ActivityReporter:
    """What reports the activity of the sessions of a running manager."""
    return manager._activity


def unreported_in(manager: DurableSessionManager) -> Mapping[UUID, object]:
    """The activity that a running manager has not reported yet, by the keys of its sessions."""
    return manager._activity._unreported


def activity_is_urgent(manager: DurableSessionManager) -> bool:
    """Whether a running manager is about to report activity before its time."""
    return manager._activity.wake._event.is_set()


def lines_of(turns: Turns) -> Mapping[Hashable, anyio.Lock]:
    """The lines of reads that wait for their turn or have it, by session and principal."""
    return turns._lines


def activity_is_failing(manager: DurableSessionManager) -> bool:
    """Whether the store did not take the last report of a running manager."""
    return manager._activity.failing


def recorder_of(manager: DurableSessionManager) -> EventRecorder:
    """What stores the events of a running manager, which has to have an event log."""
    assert manager._recorder is not None
    return manager._recorder


def instances_of(manager: DurableSessionManager) -> Instances:
    """This instance and the others, as a running manager knows them; it has to have a mailbox."""
    assert manager._instances is not None
    return manager._instances


def question_ids_of(manager: DurableSessionManager) -> QuestionIds:
    """The ids of the questions of a running manager, which has to have a mailbox."""
    return instances_of(manager).question_ids


async def report_activity(manager: DurableSessionManager) -> None:
    """Report the activity that is due, as the background task does."""
    await manager._ender.report()


async def evict_unused(manager: DurableSessionManager) -> None:
    """Evict copies that are not in use, as the background task does."""
    await manager._absences.evict_unused()


async def sweep_store(manager: DurableSessionManager) -> None:
    """Sweep the store, as the background task does."""
    await manager._ender.sweep()


async def shut_down(manager: DurableSessionManager) -> None:
    """Put all sessions away, as a stop does."""
    manager.answer_waiting()
    await stopping.shut_down(manager._registry, manager._activity, manager._instances, manager._relay)


def cancel_tasks(manager: DurableSessionManager) -> None:
    """Cancel all tasks of a manager, and the one that runs it, as a task does that ends by a cancellation."""
    assert manager._task_group is not None
    manager._task_group.cancel_scope.cancel()


def replace_shutdown(
    monkeypatch: pytest.MonkeyPatch,
    replacement: Callable[[Callable[[], Coroutine[Any, Any, None]]], Coroutine[Any, Any, None]],
) -> None:
    """Make managers shut down by a replacement, which is called with their own way to do it."""
    own = stopping.shut_down
    monkeypatch.setattr("mcp_session_store.adapter.manager.shut_down", lambda *of: replacement(lambda: own(*of)))


def is_settled(recorder: EventRecorder) -> bool:
    """Return whether events can be stored, and none waits to be."""
    return not recorder.down and not recorder._backlog.sessions


def backlog_bytes_of(manager: DurableSessionManager) -> int:
    """Bytes of the events that wait to be stored."""
    return recorder_of(manager)._backlog._bytes


def gate_of(manager: DurableSessionManager) -> Gate:
    """The gate at which requests of a running manager wait for its store."""
    return manager._gate


def waiting_at(gate: Gate) -> tuple[int, int, int, int]:
    """How many requests wait at a gate, and how many for streams; the bytes that they hold, and the calls in line."""
    return gate.waiting[False], gate.waiting[True], gate._bytes, len(gate._places) + gate._under_way


def state_storage_of(server: FastMCP[Any]) -> Any:
    """Where a FastMCP server keeps its state."""
    return server._state_storage
