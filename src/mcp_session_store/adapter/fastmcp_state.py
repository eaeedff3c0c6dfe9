"""FastMCP's own state: what `ctx.set_state` stores, and which components are shown, as part of the session."""

from __future__ import annotations

import copy
import json
import re
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.replay.marker import REPLAYED_SESSION
from mcp_session_store.adapter.sdk import fastmcp_providers, is_fastmcp, replace_state_storage
from mcp_session_store.adapter.sessions.middleware import CURRENT_SCOPE, OUTSIDE
from mcp_session_store.adapter.sessions.recording import RECORD_WRITER
from mcp_session_store.adapter.sessions.resident import RESIDENT_SESSION
from mcp_session_store.adapter.sessions.state import FASTMCP, MAX_TRIES, STATE, SessionState, encoded, new_state
from mcp_session_store.errors import StateConflict, StoreUnavailable
from mcp_session_store.records import session_key
from mcp_session_store.state_store import NO_VALUE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import SupportsFloat

    from fastmcp import FastMCP
    from key_value.aio.protocols import AsyncKeyValue
    from starlette.types import Scope

    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.sessions.state import StateAccess

    Value: TypeAlias = dict[str, Any]

__all__ = ["FastMCPState", "keep_state", "state_names"]

RULES: Final = "_visibility_rules"
"""Name of the rules that FastMCP reads by itself, several times for each request."""

UNBOUND: Final = frozenset({"session", "user"})
"""Beginnings of the keys of state that belongs to no session of the protocol."""

_SESSION_ID: Final = re.compile(r"[0-9a-f]{32}")
"""An id of a session of ours. FastMCP draws others itself, with hyphens, where there is no session."""

RULES_KEPT: Final = 5.0
"""Seconds for which the rules of a user count that were read before."""

_READ: Final[ContextVar[tuple[str, str | None]]] = ContextVar("mcp_session_store.rules_read", default=("", None))
"""Name and text of the rules of a session that were last read in a context: FastMCP adds to them, and stores all."""

MOST_RULES: Final = 10_000
"""Number of users whose rules are kept at most."""


def keep_state(
    server: FastMCP[Any],
    access: Callable[[], StateAccess | None],
    unbound: AsyncKeyValue | None,
    unbound_ttl: Callable[[], float | None],
) -> None:
    """Make a FastMCP server, and those mounted below it, keep their state as part of the sessions.

    One that was given a `session_state_store` keeps it there, as before.

    Args:
        server: The server.
        access: Returns the state of the sessions, where a task outside of all messages asks for it.
        unbound: Where state is kept that belongs to no session; `None`: in memory.
        unbound_ttl: Returns the seconds for which it is kept after it was last stored; `None`: for ever.
    """
    for name, one in state_names(server):

        def replaced(given: AsyncKeyValue | None, name: str = name) -> AsyncKeyValue:
            ours = isinstance(given, FastMCPState)
            return FastMCPState(name, access, unbound, unbound_ttl) if ours or given is None else given

        replace_state_storage(one, replaced)


def state_names(server: FastMCP[Any]) -> Iterator[tuple[str, FastMCP[Any]]]:
    """Return a server and all that are mounted below it, each once, with a name for its state.

    The server itself has the empty name. Another has the namespace that it is mounted with, or else its own name,
    behind that of the server above it. Of those that would have the same one all but the first get a number.
    """
    seen: set[int] = set()
    names: set[str] = set()

    numbers = range(2, 1_000)

    def walk(node: Any, above: str, namespace: str) -> Iterator[tuple[str, FastMCP[Any]]]:
        if id(node) in seen:
            return
        seen.add(id(node))
        given, below = fastmcp_providers(node)
        name = above
        if is_fastmcp(node):
            if node is not server:
                # FastMCP names a server that has no name at random, in each process anew.
                own = "" if re.fullmatch(r"\w+-[0-9a-f]{4}", node.name) else node.name
                path = f"{above}/{quote(namespace or own, safe='')}"
                name = next(one for one in (path, *(f"{path}~{number}" for number in numbers)) if one not in names)
                names.add(name)
            yield name, node
            given = namespace = ""
        for one in below:
            yield from walk(one, name, given or namespace)

    return walk(server, "", "")


class FastMCPState:
    """The state of one FastMCP server: an `AsyncKeyValue` of py-key-value, as its `session_state_store`.

    What FastMCP stores under the id of the session that it serves is kept as state of that session, under a name that
    begins with `fastmcp`, and lives as long as the session. A replay changes nothing of it, because what the
    replayed messages have stored is there. The rules of visibility are watched values. State of no session is kept in
    the database as well, under hashed keys, where FastMCP names a user, or a session of its own. All other state stays
    in memory: that of a single request, and of a process.

    Args:
        name: Name of the server's state, which keeps it apart from that of others in the same tree.
        access: See `keep_state`.
        unbound: See `keep_state`.
        unbound_ttl: See `keep_state`.
    """

    def __init__(
        self,
        name: str,
        access: Callable[[], StateAccess | None],
        unbound: AsyncKeyValue | None,
        unbound_ttl: Callable[[], float | None],
    ) -> None:
        self._begin = f"{FASTMCP}{name}:"
        self._access = access
        self._unbound = unbound
        self._unbound_ttl = unbound_ttl
        self._rules: dict[str, tuple[float, Value | None]] = {}
        """Rules of users, and until when they count."""

    async def get(self, key: str, *, collection: str | None = None) -> Value | None:
        """Return the value under a key; `None` where there is none."""
        scope_id, _, name = key.partition(":")
        scope = CURRENT_SCOPE.get(OUTSIDE)
        session: ResidentSession | None = scope.get(RESIDENT_SESSION) or scope.get(REPLAYED_SESSION)
        if (
            name == RULES
            and session is not None
            and session.session_id == scope_id
            and (session.record is not None or REPLAYED_SESSION in scope)
        ):
            # Without a query, because FastMCP reads them by itself, up to five times for a request.
            text = session.watched.get(self._begin + name) if session.watched else None
            _READ.set((self._begin + name, text))
            return None if text is None else _object(json.loads(text))
        if (state := self._state(scope, session, scope_id)) is not None:
            return _object(await state.get(self._begin + name))
        if scope_id in UNBOUND and self._unbound is not None:
            if name.endswith(f":{RULES}"):
                return await self._rules_of_user(key, self._unbound)
            return await self._unbound.get(key, collection=self._begin)
        return await self._in_memory.get(key, collection=collection)

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value under a key, durably before this returns, unless it is for memory."""
        scope_id, _, name = key.partition(":")
        scope = CURRENT_SCOPE.get(OUTSIDE)
        session: ResidentSession | None = scope.get(RESIDENT_SESSION) or scope.get(REPLAYED_SESSION)
        if (state := self._state(scope, session, scope_id)) is not None:
            if REPLAYED_SESSION in scope:
                return
            if name != RULES:
                await state.put(new_state(self._begin + name, encoded(name, dict(value))))
                return
            if session is None or session.record is None:
                await state.put(new_state(self._begin + name, json.dumps(dict(value)), watched=True))
            else:
                await self._put_rules(scope, session, self._begin + name, dict(value))
        elif scope_id in UNBOUND and self._unbound is not None:
            seconds = self._unbound_ttl() if ttl is None else ttl
            await self._unbound.put(key, value, collection=self._begin, ttl=seconds)
            if name.endswith(f":{RULES}"):
                self._remember(key, dict(value))
        else:
            await self._in_memory.put(key, value, collection=collection, ttl=ttl)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Remove the value under a key, and return whether there may have been one."""
        scope_id, _, name = key.partition(":")
        scope = CURRENT_SCOPE.get(OUTSIDE)
        session: ResidentSession | None = scope.get(RESIDENT_SESSION) or scope.get(REPLAYED_SESSION)
        if (state := self._state(scope, session, scope_id)) is not None:
            if REPLAYED_SESSION in scope:
                return False
            if name == RULES and session is not None and session.record is not None:
                await scope[RECORD_WRITER].write_watched(session, self._begin + name, None)
            else:
                await state.remove(self._begin + name)
            return True
        if scope_id in UNBOUND and self._unbound is not None:
            found = await self._unbound.delete(key, collection=self._begin)
            self._rules.pop(key, None)
            return found
        return await self._in_memory.delete(key, collection=collection)

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[Value | None, float | None]:
        """Return the value under a key; what it has left to live is not told."""
        return await self.get(key, collection=collection), None

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[Value | None]:
        """See `get`."""
        return [await self.get(key, collection=collection) for key in keys]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[Value | None, float | None]]:
        """See `ttl`."""
        return [await self.ttl(key, collection=collection) for key in keys]

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """See `put`."""
        for key, value in zip(keys, values, strict=True):
            await self.put(key, value, collection=collection, ttl=ttl)

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """See `delete`."""
        return sum([await self.delete(key, collection=collection) for key in keys])

    def _state(self, scope: Scope, session: ResidentSession | None, scope_id: str) -> SessionState | None:
        """Return the state of the session that a key names; `None` where it names none of ours.

        An id that a client sends with a request of no session counts for nothing, because it may be that of a session
        of another principal's. Outside of all messages it was the server that remembered the id.
        """
        access: StateAccess | None
        if session is not None:
            if session.session_id != scope_id:
                return None
            access = scope.get(STATE)
        elif scope is OUTSIDE and _SESSION_ID.fullmatch(scope_id):
            access = self._access()
        else:
            return None
        if access is None or access.store is None:
            return None
        return SessionState(access, session_key(scope_id), None if REPLAYED_SESSION in scope else session)

    async def _put_rules(self, scope: Scope, session: ResidentSession, name: str, value: Value) -> None:
        """Store the rules of a session.

        FastMCP adds a rule to those that it has read. Another call, here or elsewhere, may have stored one since, which
        is kept: the rule is added to what is stored.
        """
        read_name, text = _READ.get()
        read, rules = _rules(text), value.get("value")
        writer: RecordWriter = scope[RECORD_WRITER]
        if read_name != name or not isinstance(rules, list) or not rules or rules[: len(read)] != read:
            await writer.write_watched(session, name, new_state(name, json.dumps(value), watched=True))
            return
        assert session.record is not None
        for _ in range(MAX_TRIES):
            stored = (await writer.state.get(session.record.key, (name,))).get(name)
            before = _rules(None if stored is None else stored.value)
            state = new_state(name, json.dumps(value | {"value": before + rules[len(read) :]}), watched=True)
            try:
                await writer.write_watched(
                    session, name, state, expected=NO_VALUE if stored is None else stored.version
                )
            except StateConflict:
                continue
            return
        raise StateConflict(f"other changes of the visibility were faster {MAX_TRIES} times; try again later")

    async def _rules_of_user(self, key: str, unbound: AsyncKeyValue) -> Value | None:
        """Return the rules of a user, which FastMCP reads by itself for each request without a session."""
        known = self._rules.get(key)
        if known is not None and clock.now() < known[0]:
            return _copied(known[1])
        try:
            rules = await unbound.get(key, collection=self._begin)
        except StoreUnavailable:
            if known is None:
                raise
            return _copied(known[1])
        if self._rules.get(key) is known:
            # Else they were stored anew meanwhile.
            self._remember(key, rules)
        return rules

    def _remember(self, key: str, rules: Value | None) -> None:
        if len(self._rules) >= MOST_RULES:
            self._rules.clear()
        self._rules[key] = clock.now() + RULES_KEPT, _copied(rules)

    @cached_property
    def _in_memory(self) -> AsyncKeyValue:
        # As FastMCP makes it, where it is given none.
        from key_value.aio.stores.memory import MemoryStore

        return MemoryStore()


def _object(value: object) -> Value | None:
    return value if isinstance(value, dict) else None


def _rules(text: str | None) -> list[Any]:
    """Return the rules in a text that is stored."""
    rules = None if text is None else (_object(json.loads(text)) or {}).get("value")
    return rules if isinstance(rules, list) else []


def _copied(rules: Value | None) -> Value | None:
    """Return a copy, because FastMCP appends to the rules that it has read."""
    return copy.deepcopy(rules)
