"""Session state: values of the application's own, which every instance has, and which live as long as their session."""

from __future__ import annotations

import json
import random
import secrets
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
from mcp_types.version import is_version_at_least

from mcp_session_store.adapter.outage import RequestWait
from mcp_session_store.adapter.replay.marker import RESTORE_MARKER, SessionRestoreMarker, request_scope
from mcp_session_store.adapter.sessions.patient_store import wait_if_away
from mcp_session_store.adapter.sessions.resident import RESIDENT_SESSION
from mcp_session_store.errors import InvalidValue, NoSession, StateConflict
from mcp_session_store.records import NewState, session_key
from mcp_session_store.state_store import MAX_VERSION, NO_VALUE, check_bounds, check_name, check_state

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from uuid import UUID

    from starlette.types import Scope

    from mcp_session_store.adapter.outage import Gate
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.state_store import StateStore, StoredState

__all__ = ["FASTMCP", "STATE", "SessionState", "StateAccess", "encoded", "get_session_state", "new_state"]

STATE: Final = "mcp_session_store.state"
"""Key of a request's ASGI scope under which the `StateAccess` of its manager stands."""

FASTMCP: Final = "fastmcp"
"""Beginning of the names of FastMCP's own values among those of a session."""

_RESERVED: Final = (f"{FASTMCP}:", f"{FASTMCP}/")
"""Beginnings of names that applications cannot give to a value."""

MAX_TRIES: Final = 10
"""Number of times that an update is tried."""

FIRST_PAUSE: Final = 0.004
"""Most seconds between the first two tries of an update; twice as many before each further one."""

SESSIONLESS: Final = "2026-07-28"
"""First protocol version without sessions."""

_as_json: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class StateAccess:
    """The state of the sessions of one manager, whose calls wait while the store is away.

    Args:
        store: Store of the state; `None`: there is none.
        gate: Where calls wait.
    """

    __slots__ = ("_gate", "store")

    def __init__(self, store: StateStore | None, gate: Gate) -> None:
        self.store = store
        self._gate = gate

    async def get(self, key: UUID, names: Collection[str] | None) -> Mapping[str, StoredState]:
        """See `StateStore.get`.

        Raises:
            NoSession: The session is not live.
        """
        store = self._checked()
        found = await wait_if_away(self._gate, lambda: store.get(key, names), RequestWait("POST"))
        if found is None:
            raise NoSession("the session has ended")
        return found

    async def put(self, key: UUID, state: NewState, *, expected: int | None = None) -> int:
        """See `StateStore.put`.

        Raises:
            NoSession: The session is not live.
        """
        store = self._checked()
        put = partial(store.put, key, state, expected=expected)
        return _live(await wait_if_away(self._gate, put, RequestWait("POST")))

    async def delete(self, key: UUID, name: str) -> int:
        """See `StateStore.delete`.

        Raises:
            NoSession: The session is not live.
        """
        store = self._checked()
        return _live(await wait_if_away(self._gate, lambda: store.delete(key, name), RequestWait("POST")))

    def _checked(self) -> StateStore:
        assert self.store is not None
        return self.store


def _live(revision: int | None) -> int:
    if revision is None:
        raise NoSession("the session has ended")
    return revision


def new_state(name: str, text: str, *, ttl: float | None = None, watched: bool = False) -> NewState:
    """Return a value to be written, under a version that no other write has."""
    version = 1 + secrets.randbelow(MAX_VERSION)
    return NewState(name=name, value=text, version=version, ttl=ttl, watched=watched)


class SessionState:
    """State of one session: values under names, which every instance has, and which end with the session.

    Values are what JSON has: texts, numbers, booleans, `None`, and lists and dicts with texts as keys. Each call asks
    the store. While the database is away a call waits as requests do, for `outage_patience`, and then raises
    `StoreUnavailable`. When the session has ended meanwhile, it raises `NoSession`.

    In the handshake of a new session, which has no record yet, values are kept in memory. They are stored with
    the record, in its transaction; when the handshake fails they are dropped.

    A message that is replayed, or run for another copy, changes nothing: its first run has stored what it sets, and to
    store it again would undo what came after it.
    """

    __slots__ = ("_access", "_key", "_replayed", "_session")

    def __init__(
        self, access: StateAccess, key: UUID, session: ResidentSession | None, *, replayed: bool = False
    ) -> None:
        self._access = access
        self._key = key
        self._session = session
        self._replayed = replayed

    def __repr__(self) -> str:
        return f"<SessionState of the session {self._key}>"

    async def get(self, name: str, default: Any = None) -> Any:
        """Return the value under a name, or a default where there is none.

        Raises:
            StoreUnavailable: The database is away.
        """
        if (session := self._opening) is not None:
            found = (session.new_state or {}).get(name)
            return default if found is None else json.loads(found.value)
        stored = (await self._access.get(self._key, (name,))).get(name)
        return default if stored is None else json.loads(stored.value)

    async def items(self) -> dict[str, Any]:
        """Return all values by name.

        Raises:
            StoreUnavailable: The database is away.
        """
        if (session := self._opening) is not None:
            return {name: json.loads(state.value) for name, state in (session.new_state or {}).items()}
        stored = await self._access.get(self._key, None)
        return {name: json.loads(state.value) for name, state in stored.items()}

    async def set(self, name: str, value: Any, ttl: float | timedelta | None = None) -> None:
        """Store a value under a name, in place of the one that is there; it is committed when this returns.

        Args:
            name: Name, of 1,024 bytes at most. Names that begin with `fastmcp:` or `fastmcp/` are FastMCP's own.
            value: JSON value.
            ttl: Seconds, by the database's clock, after which there is no value any more; unless given it lives as long
                as the session.

        Raises:
            InvalidValue: The value is no JSON, or cannot be stored, or the name is FastMCP's.
            StateFull: The value, or all of the session, would be larger than the `StatePolicy` allows.
            StoreUnavailable: The database is away.
        """
        _check_own(name)
        await self.put(new_state(name, encoded(name, value), ttl=_seconds(ttl)))

    async def put(self, state: NewState) -> None:
        """Store a value that is encoded already, under any name; see `set`."""
        if self._replayed:
            return
        if (session := self._opening) is not None:
            self._keep(session, state)
            return
        await self._access.put(self._key, state)

    async def delete(self, name: str) -> None:
        """Remove the value under a name, if there is one.

        Raises:
            InvalidValue: The name is no value's, or FastMCP's.
            StoreUnavailable: The database is away.
        """
        _check_own(name)
        await self.remove(name)

    async def remove(self, name: str) -> None:
        """Remove the value under any name; see `delete`."""
        if self._replayed:
            return
        if (session := self._opening) is not None:
            check_name(name)
            session.new_state = {kept: state for kept, state in (session.new_state or {}).items() if kept != name}
            return
        await self._access.delete(self._key, name)

    async def update(
        self, name: str, function: Callable[[Any], Any], *, default: Any = None, ttl: float | timedelta | None = None
    ) -> Any:
        """Replace a value by what a function makes of it; the function may run more than once.

        What two calls change at once is changed by one after the other: where another write was faster, the function
        is called again with the value that it left, ten times at most. The function only computes: a function that
        changes something itself would do so several times. Where the database goes away while the change is being
        committed, it may be applied twice, if another call writes the same value before it can be repeated.

        Args:
            name: Name of the value.
            function: Called with the value, or with the default where there is none; returns the new value.
            default: What the function is called with where there is no value.
            ttl: See `set`.

        Returns:
            The new value; in a replay the stored one.

        Raises:
            StateConflict: Other writes were faster ten times.
            InvalidValue, StateFull, StoreUnavailable: As `set`.
        """
        seconds = _seconds(ttl)
        _check_own(name)
        if self._replayed:
            return await self.get(name, default)
        if (session := self._opening) is not None:
            found = (session.new_state or {}).get(name)
            value = function(default if found is None else json.loads(found.value))
            self._keep(session, new_state(name, encoded(name, value), ttl=seconds))
            return value
        for tries in range(MAX_TRIES):
            if tries:
                # Else calls at once go on together, and of many all but one fail each time.
                await anyio.sleep(random.uniform(0, FIRST_PAUSE * 2 ** (tries - 1)))  # noqa: S311
            stored = (await self._access.get(self._key, (name,))).get(name)
            value = function(default if stored is None else json.loads(stored.value))
            state = new_state(name, encoded(name, value), ttl=seconds)
            try:
                await self._access.put(self._key, state, expected=NO_VALUE if stored is None else stored.version)
            except StateConflict:
                continue
            return value
        raise StateConflict(f"other writes of the value were faster {MAX_TRIES} times; try again later")

    @property
    def _opening(self) -> ResidentSession | None:
        """The session while its handshake is not committed."""
        session = self._session
        return session if session is not None and session.record is None else None

    def _keep(self, session: ResidentSession, state: NewState) -> None:
        """Keep a value until the record is stored."""
        assert self._access.store is not None
        check_state(state)
        values = {**(session.new_state or {}), state.name: state}
        check_bounds(self._access.store.policy, values.values())
        session.new_state = values


def get_session_state(ctx: object) -> SessionState:
    """Return the state of the session that a context belongs to, on replayed messages of a restored session, too.

    Args:
        ctx: Any context that the SDK or FastMCP hands to a tool, a handler or a middleware, or the Starlette request in
            it; in an `on_restore` hook, the marker.

    Raises:
        NoSession: There is no session; the message says why.
    """
    scope = request_scope(ctx)
    if scope is None:
        raise NoSession("there is no HTTP request here, as on stdio or in a client in memory, and so no session")
    access: StateAccess | None = scope.get(STATE)
    if access is None:
        raise NoSession(_why_none(scope))
    if access.store is None:
        raise NoSession("the sessions' store has no StateStore beside it; give yours to durable_app as state")
    session: ResidentSession | None = scope.get(RESIDENT_SESSION)
    marker = ctx if isinstance(ctx, SessionRestoreMarker) else scope.get(RESTORE_MARKER)
    replayed = marker is not None and marker.replaying
    if session is not None:
        return SessionState(access, _key_of(session), session, replayed=replayed)
    if marker is None:
        raise NoSession("the request belongs to no session")
    return SessionState(access, session_key(marker.session_id), None, replayed=replayed)


def _key_of(session: ResidentSession) -> UUID:
    return session_key(session.session_id) if session.record is None else session.record.key


def _why_none(scope: Scope) -> str:
    version = dict(scope["headers"]).get(b"mcp-protocol-version", b"").decode("latin-1")
    if is_version_at_least(version, SESSIONLESS):
        return f"protocol {SESSIONLESS} and later has no sessions"
    return "the server is stateless, or the request did not come through the app that durable_app returned"


def _check_own(name: str) -> None:
    """Refuse a name under which an application can keep nothing."""
    check_name(name)
    if name.startswith(_RESERVED):
        raise InvalidValue(f"the name {name!r} begins as those of FastMCP's own values do; choose another one")


def encoded(name: str, value: Any) -> str:
    """Return a value as JSON text.

    Raises:
        InvalidValue: It is no JSON.
    """
    try:
        # ASCII, so that `\u0000` and lone surrogates stay escapes, which any database keeps.
        text = _as_json(value)
        _check_keys(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"the value of {name!r} is no JSON: {error}") from None
    return text


def _check_keys(value: Any) -> None:
    """Refuse dicts with keys that are no texts, which the encoder would make texts, so that another value came back."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)


def _seconds(ttl: float | timedelta | None) -> float | None:
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float | timedelta):
        raise InvalidValue(f"ttl={ttl!r} is no number of seconds, no timedelta and not None")
    return ttl.total_seconds() if isinstance(ttl, timedelta) else float(ttl)
