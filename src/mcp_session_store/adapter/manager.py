"""The session manager with a store: memory is a cache of the sessions in it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import random
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import uuid4

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.streamable_http import SESSION_ID_PATTERN
from mcp.server.streamable_http_manager import (
    DEFAULT_MAX_REQUEST_BODY_SIZE,
    DEFAULT_MAX_SESSIONS,
    DEFAULT_SESSION_IDLE_TIMEOUT,
)
from mcp.server.transport_security import TransportSecurityMiddleware
from starlette.requests import Request

from mcp_session_store.adapter import middleware, responses, sdk, telemetry
from mcp_session_store.adapter.handshake import DEFAULT_MAX_INITIALIZE_PARAMS, HANDSHAKE, Handshake, HeldResponse
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.marker import RESTORE_MARKER
from mcp_session_store.adapter.replay import Replay
from mcp_session_store.adapter.request_ids import RequestIds
from mcp_session_store.adapter.session import RESIDENT_SESSION, ResidentSession
from mcp_session_store.errors import (
    ConfigurationError,
    RestoreRefused,
    SchemaError,
    SessionStoreError,
    StoreUnavailable,
)
from mcp_session_store.records import (
    Activity,
    EndReason,
    NewSession,
    Principal,
    SessionRecord,
    SessionRestoreMarker,
    display_text,
    session_key,
)
from mcp_session_store.store import SessionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from uuid import UUID

    from anyio.abc import TaskStatus
    from fastmcp import FastMCP
    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from mcp.server.streamable_http import EventStore, StreamableHTTPServerTransport
    from mcp.server.transport_security import TransportSecuritySettings
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    from mcp_session_store.adapter.handshake import InitializeParams

__all__ = ["DEFAULT_REPLAY_TIMEOUT", "DurableSessionManager", "EndHook", "RestoreHook"]

logger = logging.getLogger(__name__)

RestoreHook: TypeAlias = Callable[[SessionRestoreMarker, SessionRecord], Awaitable[None]]
EndHook: TypeAlias = Callable[[SessionRecord, EndReason], Awaitable[None]]

DEFAULT_REPLAY_TIMEOUT: Final = 5.0
SHUTDOWN_TIMEOUT: Final = 5.0
"""Seconds for what is still to be written when the manager stops."""
END_HOOK_TIMEOUT: Final = 5.0
"""Seconds that an `on_end` hook may hold up the answer to a DELETE."""
MAX_SESSION_ID: Final = 128
"""Characters; a longer id costs no query. The SDK's own have 32."""
LEAVE_TIMEOUT: Final = 10.0
"""Seconds that a restore waits for an earlier copy: the SDK gives a connection's `exit_stack` five."""
ACTIVITY_DELAY: Final = 0.05
"""Seconds in which first activities gather before they are reported together."""
MAX_BACKOFF: Final = 30.0
"""Seconds between two tries of a background task that keeps failing."""
RESTORE_ATTEMPTS: Final = 3
"""How often a restore begins anew because the record changed meanwhile."""


class _NotFound(Exception):
    """Unknown, ended, expired, of another namespace or principal: all the same to the client."""


class _TooManySessions(Exception):
    """Memory is full."""


class _Restore:
    """One restore under way, and everybody who waits for it."""

    def __init__(self) -> None:
        self.over = Latch()
        self.waiters = 0
        self.session: ResidentSession | None = None
        self.failure: Exception | None = None
        self.ended = False
        """The session ended while it was being restored."""


class DurableSessionManager(sdk.ManagerSeams):
    """A `StreamableHTTPSessionManager` whose sessions live in a store.

    A session that is not in memory is restored from its record, by replaying the client's
    handshake; a session that is in memory waits for no query. The restored session goes by the same
    id, to the same principal, and the application finds a `SessionRestoreMarker` in its contexts.

    Args:
        app: An `MCPServer`, a low-level `Server`, or a FastMCP 4 server.
        store: Where the sessions are kept. The manager opens it when it starts to run. A store that
            cannot be reached then stops nothing: requests that need it are answered 503.
        event_store: As for the SDK's manager.
        json_response: As for the SDK's manager.
        stateless: Refused: a stateless server has no sessions to store.
        security_settings: As for the SDK's manager. A request is checked before a session is restored.
        retry_interval: As for the SDK's manager, in milliseconds.
        session_idle_timeout: Seconds after which a session that nobody uses leaves memory. It stays
            in the store, and the next request restores it. `None`: never.
        max_request_body_size: As for the SDK's manager, in bytes.
        max_sessions: Sessions in memory at most; a request that needs one more is answered 503.
        on_restore: Called with the marker and the record before the replay. It may raise
            `RestoreRefused`: the session ends, and the client gets 404. Any other error, and a hook
            that takes longer than `replay_timeout`, is answered 503.
        on_end: Called once with the record and the reason, in the instance in which the session is
            resident when it ends; not when a copy leaves memory.
        replay_timeout: Seconds that a replay may take: for the answer to `initialize`, and again for the
            handler of `notifications/initialized`, which then goes on beside the client's requests.
        max_initialize_params: Bytes of `initialize` params, as JSON, that are stored; more is
            refused with INVALID_PARAMS.
        close_store: Close the store when the manager stops.

    Raises:
        ConfigurationError: A value that cannot work, by its name.
    """

    def __init__(
        self,
        app: MCPServer[Any] | Server[Any] | FastMCP[Any],
        store: SessionStore,
        *,
        event_store: EventStore | None = None,
        json_response: bool = False,
        stateless: bool = False,
        security_settings: TransportSecuritySettings | None = None,
        retry_interval: int | None = None,
        session_idle_timeout: float | None = DEFAULT_SESSION_IDLE_TIMEOUT,
        max_request_body_size: int = DEFAULT_MAX_REQUEST_BODY_SIZE,
        max_sessions: int | None = DEFAULT_MAX_SESSIONS,
        on_restore: RestoreHook | None = None,
        on_end: EndHook | None = None,
        replay_timeout: float = DEFAULT_REPLAY_TIMEOUT,
        max_initialize_params: int = DEFAULT_MAX_INITIALIZE_PARAMS,
        close_store: bool = False,
    ) -> None:
        if stateless:
            raise ConfigurationError(
                "a stateless server has no sessions to store; leave out stateless, or use the SDK's own manager"
            )
        if not isinstance(store, SessionStore):
            raise ConfigurationError(
                f"store must be a SessionStore, not a {type(store).__name__}; a URL goes to SqlSessionStore"
            )
        if not isinstance(replay_timeout, int | float) or not 0 < replay_timeout < math.inf:
            raise ConfigurationError(f"replay_timeout must be a positive number of seconds, not {replay_timeout!r}")
        if not isinstance(max_initialize_params, int) or max_initialize_params <= 0:
            raise ConfigurationError(
                f"max_initialize_params must be a positive number of bytes, not {max_initialize_params!r}"
            )
        try:
            super().__init__(
                sdk.underlying_server(app),
                event_store=event_store,
                json_response=json_response,
                security_settings=security_settings,
                retry_interval=retry_interval,
                session_idle_timeout=session_idle_timeout,
                max_request_body_size=max_request_body_size,
                max_sessions=max_sessions,
            )
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        self.store = store
        self.instance = ""
        """Names the process; made when the manager starts to run, because processes fork before."""
        self._on_restore = on_restore
        self._on_end = on_end
        self._replay_timeout = replay_timeout
        self._max_initialize_params = max_initialize_params
        self._close_store = close_store
        self._security = TransportSecurityMiddleware(security_settings)
        self._residents: dict[str, ResidentSession] = {}
        self._seats = 0
        """Sessions in memory: resident, or being opened or restored."""
        self._leaving: dict[str, ResidentSession] = {}
        self._restores: dict[str, _Restore] = {}
        self._first_activities: dict[UUID, tuple[float, float]] = {}
        self._activity = anyio.Event()

    @property
    def max_initialize_params(self) -> int:
        """Bytes of `initialize` params that are stored at most."""
        return self._max_initialize_params

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Serve sessions while the context is open; once for each manager, as the SDK's.

        When it closes, what is resident leaves memory. No session ends by it.

        Raises:
            SchemaError: The database answers, and its schema does not fit.
        """
        self.instance = instance_id()
        middleware.install(self.app)
        async with contextlib.AsyncExitStack() as stack:
            if self._close_store:
                stack.push_async_callback(self._close)
            try:
                await self.store.open()
            except StoreUnavailable as error:
                logger.warning("the session store cannot be reached; requests that need it get 503: %s", error)
            async with super().run():
                self.tasks.start_soon(self._report_activity)
                if self.session_idle_timeout is not None:
                    self.tasks.start_soon(self._evict_idle, self.session_idle_timeout)
                try:
                    yield
                finally:
                    await self._shut_down()

    async def _close(self) -> None:
        with anyio.move_on_after(SHUTDOWN_TIMEOUT, shield=True):
            await self.store.aclose()

    async def _shut_down(self) -> None:
        with anyio.move_on_after(SHUTDOWN_TIMEOUT, shield=True):
            # Closed streams let open responses end whole, instead of being cut when the tasks are cancelled.
            for session in list(self._residents.values()):
                await self._evict(session)
            try:
                await self._flush_activity()
            except Exception as error:
                self._background_failure("activity", error)

    # One request

    async def serve_session_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request of the handshake era: by its resident session, after a restore, or by a new one."""
        session_id = _session_id(scope)
        user = scope.get("user")
        requestor = authorization_context(user) if isinstance(user, AuthenticatedUser) else None
        if session_id is None:
            await self._open(requestor, scope, receive, send)
            return
        session = self._residents.get(session_id)
        method = scope["method"]
        if session is None or not session.serving or session.owner != requestor or method not in ("POST", "GET"):
            found = await self._find(session_id, requestor, scope, receive)
            if not isinstance(found, ResidentSession):
                await found(scope, receive, send)
                return
            session = found
        else:
            session.pin()
        try:
            await self._serve(session, scope, receive, send)
        finally:
            session.unpin()

    async def _serve(self, session: ResidentSession, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request to its resident session."""
        if session.first_activity_due:
            session.first_activity_due = False
            self._note_first_activity(session)
        scope[RESIDENT_SESSION] = session
        if session.marker is not None:
            scope[RESTORE_MARKER] = session.marker
        if scope["method"] == "GET":
            send = _watch_stream(session, send)
        else:
            message = await receive()
            receive = _again(message, receive)
            # The handshake's own answer promises durability; the body is looked into for its name
            # rather than parsed, and the middleware releases whatever else has it.
            if b'"initialize"' in message.get("body", b""):
                handshake = Handshake()
                held = HeldResponse(handshake, scope, receive, send, opening=False)
                with _held_by(session, handshake, scope):
                    await held.answered_by(partial(session.transport.handle_request, scope, receive))
                return
        await session.transport.handle_request(scope, receive, send)

    async def _find(
        self, session_id: str, requestor: AuthorizationContext | None, scope: Scope, receive: Receive
    ) -> ResidentSession | Response:
        """The session of a request, pinned, or the answer that it gets instead."""
        request = Request(scope, receive)
        if (refusal := await self._security.validate_request(request, is_post=request.method == "POST")) is not None:
            return refusal
        if request.method not in ("POST", "GET", "DELETE"):
            return responses.method_not_allowed()
        if len(session_id) > MAX_SESSION_ID or not SESSION_ID_PATTERN.fullmatch(session_id):
            return _refused("not found", responses.session_not_found())
        try:
            if request.method == "DELETE":
                await self._delete(session_id, requestor)
                return responses.session_ended(session_id)
            return await self._restored(session_id, requestor, scope)
        except _NotFound:
            return _refused("not found", responses.session_not_found())
        except _TooManySessions:
            return _refused("too many sessions", responses.too_many_sessions())
        except Exception as error:
            _log_unavailable(error)
            return _refused("unavailable", responses.unavailable())

    # A new session

    async def _open(self, requestor: AuthorizationContext | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request without a session id: an `initialize` opens a session, all else is refused by the SDK."""
        try:
            session = self._admit(uuid4().hex, requestor)
        except _TooManySessions:
            await _refused("too many sessions", responses.too_many_sessions())(scope, receive, send)
            return
        handshake = Handshake()
        held = HeldResponse(handshake, scope, receive, send, opening=True)
        scope[RESIDENT_SESSION] = session

        async def serve(send: Send) -> None:
            await self.tasks.start(self._run_session, session)
            await session.transport.handle_request(scope, receive, send)

        try:
            with _held_by(session, handshake, scope):
                await held.answered_by(serve)
        finally:
            if not held.opened:
                await self._evict(session)

    def _admit(self, session_id: str, owner: AuthorizationContext | None) -> ResidentSession:
        """Take a seat for a session that is to become resident."""
        if self.max_sessions is not None and self._seats >= self.max_sessions:
            logger.warning("%d sessions are in memory, as many as max_sessions allows", self._seats)
            raise _TooManySessions
        session = ResidentSession(session_id, owner, sdk.make_transport(self, session_id), self)
        self._seats += 1
        return session

    async def _run_session(
        self, session: ResidentSession, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        await session.run(self, self._gone, task_status=task_status)

    async def record_handshake(self, session: ResidentSession, params: InitializeParams, version: str) -> bool:
        """Commit a handshake; the session's first one makes it resident."""
        try:
            if session.record is None:
                await self._store_handshake(session, params, version)
                return True
            return await self._replace_handshake(session, params, version)
        except Exception as error:
            _log_unavailable(error)
            telemetry.refused.add(1, {"reason": "unavailable"})
            raise

    async def _store_handshake(self, session: ResidentSession, params: InitializeParams, version: str) -> None:
        session.record = await self.store.create(
            NewSession(
                key=session_key(session.session_id),
                initialize_params=params.text,
                protocol_version=version,
                client_name=params.client_name,
                client_version=params.client_version,
                principal=_principal(session.owner),
                instance=self.instance,
            )
        )
        session.first_activity_due = True
        telemetry.created.add(1)
        self._publish(session)

    async def _replace_handshake(self, session: ResidentSession, params: InitializeParams, version: str) -> bool:
        assert session.record is not None
        live = await self.store.replace_initialize(
            session.record.key,
            initialize_params=params.text,
            protocol_version=version,
            client_name=params.client_name,
            client_version=params.client_version,
        )
        if live:
            session.record = dataclasses.replace(
                session.record,
                initialize_params=params.text,
                protocol_version=version,
                client_name=params.client_name,
                client_version=params.client_version,
                revision=session.record.revision + 1,
            )
            # The `notifications/initialized` that follows is not the one that was replayed.
            session.swallow_initialized = False
        else:
            self._withdraw(session)
            self.tasks.start_soon(session.leave)
        return live

    # A session that is not in memory

    async def _restored(self, session_id: str, requestor: AuthorizationContext | None, scope: Scope) -> ResidentSession:
        """The session, resident and pinned.

        Raises:
            _NotFound: To this requestor there is no such session.
            _TooManySessions: Memory is full.
            SessionStoreError: The store did not answer.
        """
        session = self._residents.get(session_id)
        if session is None or not session.serving or session.owner != requestor:
            # A resident session of somebody else's costs the query as well: neither the time that the answer
            # takes nor a store that is down tells it from one that does not exist.
            record = await self._record_of(session_id, requestor)
            # It may have been restored while the query ran.
            session = self._residents.get(session_id)
            if session is None or not session.serving:
                return await self._join_restore(session_id, record, requestor, scope)
        session.pin()
        return session

    async def _record_of(self, session_id: str, requestor: AuthorizationContext | None) -> SessionRecord:
        record = await self.store.load(session_key(session_id))
        if record is None or record.principal != _principal(requestor):
            raise _NotFound
        return record

    async def _join_restore(
        self, session_id: str, record: SessionRecord, requestor: AuthorizationContext | None, scope: Scope
    ) -> ResidentSession:
        """Wait for the one restore of this session, beginning it if nobody has; whoever joins is its principal."""
        restore = self._restores.get(session_id)
        if restore is None:
            restore = self._restores[session_id] = _Restore()
            # A task of the manager's: the disconnect of this request fails nobody else's. It inherits
            # this request's context variables.
            self.tasks.start_soon(self._run_restore, restore, session_id, record, requestor, scope)
        restore.waiters += 1
        try:
            await restore.over.wait()
        except BaseException:
            if restore.session is not None:
                restore.session.unpin()
            restore.waiters -= 1
            raise
        if restore.session is None:
            assert restore.failure is not None
            raise restore.failure
        return restore.session

    async def _run_restore(
        self,
        restore: _Restore,
        session_id: str,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
    ) -> None:
        try:
            session = await self._restore(restore, session_id, record, requestor, scope)
            # Pinned for everybody who waits, before anything else can run: none of them meets a leaving copy.
            session.pins += restore.waiters
            restore.session = session
        except (_NotFound, _TooManySessions, SessionStoreError) as failure:
            restore.failure = failure
        except Exception:
            logger.exception("a session could not be restored")
            restore.failure = StoreUnavailable("the session could not be restored")
        finally:
            if restore.session is None and restore.failure is None:
                restore.failure = StoreUnavailable("the manager is shutting down")
            del self._restores[session_id]
            restore.over.set()

    async def _restore(
        self,
        restore: _Restore,
        session_id: str,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
    ) -> ResidentSession:
        """Make a session resident from its record."""
        for _ in range(RESTORE_ATTEMPTS):
            await self._await_predecessor(session_id)
            marker = SessionRestoreMarker(
                session_id=session_id,
                created_at=record.created_at,
                restored_at=datetime.now(UTC),
                restores=record.restores + 1,
                previous_instance=record.instance_hint,
                replaying=True,
            )
            await self._ask_application(marker, record)
            session = self._admit(session_id, requestor)
            try:
                claimed = await self._replay(session, marker, record, scope)
                if restore.ended:
                    raise _NotFound
                if not session.serving or session.gone.is_set():
                    raise StoreUnavailable("the server loop of a session ended while it was being restored")
                if claimed.revision == record.revision:
                    session.record = claimed
                    session.marker = dataclasses.replace(marker, restores=claimed.restores, replaying=False)
                    self._publish(session)
                    telemetry.restored.add(1)
                    return session
            finally:
                if self._residents.get(session_id) is not session:
                    await self._evict(session)
            # What was replayed has been replaced meanwhile, on another instance.
            record = claimed
        raise StoreUnavailable("the session kept changing while it was restored")

    async def _await_predecessor(self, session_id: str) -> None:
        """Wait until an earlier copy of this session has left, clean-up included."""
        if (terminated := self._residents.get(session_id)) is not None:
            await self._evict(terminated)
        predecessor = self._leaving.get(session_id)
        if predecessor is None:
            return
        with anyio.move_on_after(LEAVE_TIMEOUT):
            await predecessor.gone.wait()
            return
        raise StoreUnavailable("an earlier copy of the session has not left memory yet; a handler of it does not end")

    async def _ask_application(self, marker: SessionRestoreMarker, record: SessionRecord) -> None:
        if self._on_restore is None:
            return
        try:
            with anyio.fail_after(self._replay_timeout):
                await self._on_restore(marker, record)
        except RestoreRefused:
            await self.store.end(record.key, reason=EndReason.REFUSED)
            telemetry.ended.add(1, {"reason": EndReason.REFUSED.value})
            raise _NotFound from None

    async def _replay(
        self, session: ResidentSession, marker: SessionRestoreMarker, record: SessionRecord, scope: Scope
    ) -> SessionRecord:
        """Replay the handshake into a session that nobody can reach yet, and claim it."""
        session.swallow_initialized = True
        session.request_ids = RequestIds()
        replay = session.replay = Replay(
            record, marker, scope, binding={RESIDENT_SESSION: session}, timeout=self._replay_timeout
        )
        # Twice its timeout: once for the answer to `initialize`, once for the notification's handler.
        self.tasks.start_soon(self._run_session, session)
        with anyio.move_on_after(2 * self._replay_timeout):
            await replay.over.wait()
        if not replay.over.is_set():
            raise StoreUnavailable("the replay of a session's handshake took too long")
        if replay.broken:
            raise StoreUnavailable(f"a session could not be restored: {replay.failure}")
        if replay.failure is not None:
            # The record stays: in a rolling deploy other instances still serve the session.
            logger.warning("a session cannot be restored by this instance: %s", replay.failure)
            raise _NotFound
        claimed = await self.store.claim(record.key, instance=self.instance, restores=record.restores)
        if claimed is None:
            raise _NotFound
        return claimed

    # Ending

    async def _delete(self, session_id: str, requestor: AuthorizationContext | None) -> None:
        """End a session for its principal, resident or not.

        Raises:
            _NotFound: To this requestor there is no such session.
            SessionStoreError: The store did not answer, and the copy stays as it is.
        """
        done = anyio.Event()
        failure: Exception | None = StoreUnavailable("the manager is shutting down")

        async def end() -> None:
            nonlocal failure
            try:
                await self._end(session_id, requestor)
                failure = None
            except Exception as error:
                failure = error
            finally:
                done.set()

        # A task of the manager's: what is committed is carried through, whether the client stays or not.
        self.tasks.start_soon(end)
        await done.wait()
        if failure is not None:
            raise failure

    async def _end(self, session_id: str, requestor: AuthorizationContext | None) -> None:
        session = self._residents.get(session_id)
        if session is None or session.owner != requestor:
            await self._record_of(session_id, requestor)
        ended = await self.store.end(session_key(session_id), reason=EndReason.CLIENT)
        if (restore := self._restores.get(session_id)) is not None:
            restore.ended = True
        session = self._residents.get(session_id)
        if session is not None:
            await self._evict(session)
        if not ended:
            raise _NotFound
        telemetry.ended.add(1, {"reason": EndReason.CLIENT.value})
        if session is not None:
            await self._tell_application(session, EndReason.CLIENT)

    async def _tell_application(self, session: ResidentSession, reason: EndReason) -> None:
        if self._on_end is None or session.record is None:
            return
        try:
            with anyio.fail_after(END_HOOK_TIMEOUT):
                await self._on_end(session.record, reason)
        except Exception:
            logger.exception("the on_end hook failed")

    # Memory

    def _publish(self, session: ResidentSession) -> None:
        """Let requests find a session."""
        self._residents[session.session_id] = session
        self.transports[session.session_id] = session.transport
        if session.owner is not None:
            self.owners[session.session_id] = session.owner

    def _withdraw(self, session: ResidentSession) -> None:
        """Let no request find this copy any more; a successor under the same id is left alone."""
        if self._residents.get(session.session_id) is session:
            del self._residents[session.session_id]
            self.owners.pop(session.session_id, None)
        if self.transports.get(session.session_id) is session.transport:
            del self.transports[session.session_id]
        if not session.leaving:
            session.leaving = True
            self._seats -= 1
            if session.record is not None:
                telemetry.evicted.add(1)
            if session.running and not session.gone.is_set():
                self._leaving[session.session_id] = session

    async def _evict(self, session: ResidentSession) -> None:
        """Drop a copy from memory; the record stays."""
        self._withdraw(session)
        await session.leave()

    async def discard(self, session_id: str, transport: StreamableHTTPServerTransport) -> None:
        """Evict the session of this transport; one that was restored under the same id stays."""
        session = self._residents.get(session_id)
        if session is not None and session.transport is transport:
            await self._evict(session)

    def _gone(self, session: ResidentSession) -> None:
        """The server task of a session has ended: evicted, crashed, or its transport was terminated by others."""
        self._withdraw(session)
        if self._leaving.get(session.session_id) is session:
            del self._leaving[session.session_id]

    async def _evict_idle(self, timeout: float) -> None:
        """Evict sessions that have been idle for longer than this, in seconds."""
        while True:
            await anyio.sleep(min(max(timeout / 4, 0.05), 5.0))
            horizon = anyio.current_time() - timeout
            for session in list(self._residents.values()):
                if session.idle_since <= horizon and not session.busy:
                    try:
                        await self._evict(session)
                    except Exception as error:
                        self._background_failure("eviction", error)

    # First activity

    def _note_first_activity(self, session: ResidentSession) -> None:
        assert session.record is not None
        now = anyio.current_time()
        first, _ = self._first_activities.get(session.record.key, (now, now))
        self._first_activities[session.record.key] = (first, now)
        self._activity.set()

    async def _report_activity(self) -> None:
        """Report first activities to the store, in batches, until that succeeds."""
        backoff = ACTIVITY_DELAY
        while True:
            await self._activity.wait()
            await anyio.sleep(backoff)
            self._activity = anyio.Event()
            try:
                await self._flush_activity()
                backoff = ACTIVITY_DELAY
            except Exception as error:
                self._background_failure("activity", error)
                self._activity.set()
                backoff = min(max(backoff, 0.25) * 2, MAX_BACKOFF) * random.uniform(0.75, 1.0)  # noqa: S311 - jitter

    async def _flush_activity(self) -> None:
        reported = self._first_activities
        if not reported:
            return
        self._first_activities = {}
        now = anyio.current_time()
        try:
            not_live = await self.store.touch(
                [
                    Activity(key=key, first_age=now - first, last_age=now - last)
                    for key, (first, last) in reported.items()
                ]
            )
        except BaseException:
            self._first_activities = {**reported, **self._first_activities}
            raise
        if not_live:
            for session in list(self._residents.values()):
                if session.record is not None and session.record.key in not_live:
                    await self._evict(session)

    def _background_failure(self, task: str, error: Exception) -> None:
        telemetry.background_failures.add(1, {"task": task})
        if isinstance(error, SessionStoreError):
            logger.warning("the background task %s failed, and tries again: %s", task, error)
        else:
            logger.error("the background task %s failed, and tries again", task, exc_info=error)


def instance_id() -> str:
    """A name for this process: host, process id, and a random part, because the first two come again."""
    return f"{display_text(socket.gethostname(), length=80)}:{os.getpid()}:{uuid4().hex[:8]}"


def _principal(owner: AuthorizationContext | None) -> Principal | None:
    return None if owner is None else Principal.of(**owner)


def _session_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"mcp-session-id":
            decoded: str = value.decode("latin-1")
            return decoded
    return None


def _log_unavailable(error: Exception) -> None:
    """Say why a request gets 503."""
    if isinstance(error, SchemaError):
        logger.error("a request is refused, the session store cannot be used: %s", error)
    elif isinstance(error, SessionStoreError):
        logger.warning("a request is refused for now: %s", error)
    else:
        logger.error("a request is refused because of an unexpected error", exc_info=error)


def _refused(reason: str, response: Response) -> Response:
    telemetry.refused.add(1, {"reason": reason})
    return response


@contextlib.contextmanager
def _held_by(session: ResidentSession, handshake: Handshake, scope: Scope) -> Iterator[None]:
    """While an HTTP answer waits for what may be a handshake: the middleware finds it, the copy's end settles it."""
    scope[HANDSHAKE] = handshake
    session.held.add(handshake)
    try:
        yield
    finally:
        session.held.discard(handshake)


def _again(message: Message, receive: Receive) -> Receive:
    """`receive`, with a message that was taken from it put back."""
    taken: Message | None = message

    async def again() -> Message:
        nonlocal taken
        if taken is not None:
            message, taken = taken, None
            return message
        return await receive()

    return again


def _watch_stream(session: ResidentSession, send: Send) -> Send:
    """`send` of a GET, watched for the standalone stream's opening."""

    async def watched(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.start" and message["status"] == 200:
            session.standalone_stream_open.set()

    return watched
