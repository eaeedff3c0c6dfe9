"""Creation of sessions, within the limits of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_session_store.records import EndReason, SessionRecord
from mcp_session_store.sql.sessions.records import Loaded, as_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from mcp_session_store.errors import SessionLimitReached
    from mcp_session_store.records import NewSession
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.sessions.limits import Limits
    from mcp_session_store.sql.sessions.records import Records
    from mcp_session_store.sql.sessions.removal import SessionRemoval
    from mcp_session_store.sql.sessions.state import StateChanges

__all__ = ["Creation"]


class Creation:
    """Creation of the sessions of one namespace.

    Args:
        dialect: The database's dialect.
        namespace: The namespace.
        records: Loads sessions that exist already.
        limits: The limits of the policy.
        removal: Ends sessions to make room.
        state: Stores the state that comes with sessions.
    """

    def __init__(
        self,
        dialect: Dialect,
        *,
        namespace: str,
        records: Records,
        limits: Limits,
        removal: SessionRemoval,
        state: StateChanges,
    ) -> None:
        self.limits = limits
        """Limits of the policy; replaced when it is."""
        self._dialect = dialect
        self._namespace = namespace
        self._records = records
        self._removal = removal
        self._state = state

    async def create(
        self, attempt: Attempt, sessions: Sequence[NewSession]
    ) -> list[SessionRecord | SessionLimitReached | None]:
        """Create sessions, each once.

        Returns:
            For each its record, the refusal, or `None` where another record stands under the key.
        """
        # Of several sessions with one key the first is created, and the others find it there.
        first: dict[UUID, NewSession] = {}
        for session in sessions:
            first.setdefault(session.key, session)
        wanted = [first[key] for key in sorted(first, key=as_number)]
        limited = self.limits.concern(wanted)
        steps = self._create(wanted, within_limits=limited)
        atomic = limited or any(session.state for session in wanted)
        records, refused = await self._dialect.run(attempt.connection, steps, writes=True, atomic=atomic)
        return [
            refused[session.key]
            if session.key in refused
            else record
            if isinstance(record := records.get(session.key), SessionRecord) and _same(record, session)
            else None
            for session in sessions
        ]

    def _create(
        self, wanted: Sequence[NewSession], *, within_limits: bool
    ) -> Steps[tuple[dict[UUID, Loaded], Mapping[UUID, SessionLimitReached]]]:
        """Create the sessions whose keys are free; return them and those that exist and are live, and the refusals."""
        records: dict[UUID, Loaded] = {}
        refused: Mapping[UUID, SessionLimitReached] = {}
        if within_limits:
            created, refused = yield from self._insert_within_limits(wanted)
            records |= created
        else:
            records |= yield from self._insert(wanted)
        if with_state := [new for new in wanted if new.state and new.key in records]:
            yield from self._state.store_new(with_state)
        if present := [new.key for new in wanted if new.key not in records and new.key not in refused]:
            records |= yield from self._records.load_live(present)
        return records, refused

    def _insert(self, sessions: Sequence[NewSession]) -> Steps[dict[UUID, SessionRecord]]:
        """Insert the sessions whose keys are free, and return their records."""
        sql = self._records.statements
        by_driver_key = {self._dialect.driver_key(session.key): session for session in sessions}
        rows = yield sql.create, sql.creates.parameters([_row(key, new) for key, new in by_driver_key.items()])
        records = {}
        for key, *moments in rows:
            session = by_driver_key[key]
            records[session.key] = _new_record(session, self._namespace, *self._dialect.moments(moments))
        return records

    def _insert_within_limits(
        self, sessions: Sequence[NewSession]
    ) -> Steps[tuple[dict[UUID, SessionRecord], dict[UUID, SessionLimitReached]]]:
        limits, removal = self.limits, self._removal
        yield from limits.lock(sessions)
        new = yield from limits.uncreated(sessions)
        refused, removed = yield from limits.refuse(new)
        yield from removal.remove_with_session(removed)
        admitted = [session for session in new if session.key not in refused]
        records = (yield from self._insert(admitted)) if admitted else {}
        excess = yield from limits.excess([session for session in admitted if session.key in records])
        if excess:
            yield from removal.end_within([(key, EndReason.LIMIT.value) for key in sorted(excess)])
        return records, refused


def _row(key: object, session: NewSession) -> tuple[object, ...]:
    """Return the values of a session in the order of the columns of `SessionStatements.creates`."""
    principal = session.principal
    return (
        key,
        session.initialize_params,
        session.protocol_version,
        session.client_name,
        session.client_version,
        None if principal is None else principal.digest.hex(),
        None if principal is None else principal.display,
        session.instance,
    )


def _new_record(
    session: NewSession, namespace: str, created_at: Any, last_seen_at: Any, expires_at: Any
) -> SessionRecord:
    return SessionRecord(
        key=session.key,
        namespace=namespace,
        initialize_params=session.initialize_params,
        protocol_version=session.protocol_version,
        client_name=session.client_name,
        client_version=session.client_version,
        principal=session.principal,
        instance_hint=session.instance,
        created_at=created_at,
        last_seen_at=last_seen_at,
        expires_at=expires_at,
        restores=0,
        revision=0,
    )


def _same(record: SessionRecord, session: NewSession) -> bool:
    """Return whether a record is the result of creating this session."""
    return (
        record.initialize_params == session.initialize_params
        and record.protocol_version == session.protocol_version
        and record.principal == session.principal
        and record.instance_hint == session.instance
    )
