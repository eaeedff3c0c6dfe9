"""Limits on the number of sessions, enforced within the transaction that creates some."""

from __future__ import annotations

import hashlib
import math
import time
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.errors import SessionLimitReached
from mcp_session_store.retention import MIN_TOMBSTONE
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.sql.sessions.statements import live

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from mcp_session_store.records import NewSession
    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Limits"]

SPARE_FOR: Final = 300.0
"""Seconds after which sessions without a principal are counted again, however much room there was."""

FULL_FOR: Final = 1.0
"""Seconds for which further sessions without a principal are refused without counting."""

MANY: Final = 1_000
"""Number of sessions above which to count them takes long, and others wait for it."""


class Limits:
    """Limits of a policy on the sessions of one namespace.

    A lock for each principal is taken before its sessions are counted, so that two instances that create at once do
    not both find room for the last one. Sessions without a principal are many, and not counted each time: while
    there was much room a moment ago, an instance may use a hundredth of it without counting.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
        retention: The policy.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, retention: RetentionPolicy) -> None:
        self._dialect = dialect
        self._namespace = namespace
        self._retention = retention
        self._spare = 0
        """Number of sessions without a principal that may be created without counting."""
        self._spare_until = -math.inf
        self._full_until = -math.inf
        """Moment up to which sessions without a principal are refused, because a count found no room."""
        table = sessions_table(schema)
        mine = table.c.namespace == sa.literal(namespace, sa.Text)

        self._locks = dialect.batch("locks", {"number": sa.BigInteger()})
        lock = dialect.lock_numbers(self._locks)
        self._lock = None if lock is None else dialect.precompiled(lock)
        self._keys = dialect.batch("created_keys", {"key": sa.Uuid()})
        self._present = dialect.precompiled(sa.select(table.c.key).where(self._keys.in_batch(table.c.key)))

        self._principals = dialect.batch("principals", {"principal_digest": sa.Text()})
        theirs = (
            self._principals.in_batch(table.c.principal_digest),
            live(table, sa.literal(namespace, sa.Text), StoreClock(), by_key=False),
        )
        self._count = dialect.precompiled(
            sa.select(table.c.principal_digest, sa.func.count().label("live"))
            .where(*theirs)
            .group_by(table.c.principal_digest)
        )
        # Times may be equal to the millisecond; a new session then counts as the last that was seen.
        is_new = sa.case((self._keys.in_batch(table.c.key), 1), else_=0)
        rank = sa.func.row_number().over(
            partition_by=table.c.principal_digest,
            order_by=(table.c.last_seen_at.desc(), is_new.desc(), table.c.created_at.desc()),
        )
        ranked = sa.select(table.c.key, rank.label("rank")).where(*theirs).subquery("ranked")
        self._excess = dialect.precompiled(
            sa.select(ranked.c.key).where(ranked.c.rank > sa.bindparam("kept", type_=sa.Integer))
        )

        anonymous = mine & table.c.principal_digest.is_(None)
        # In the order of the index, whose first column is the principal, null or not: so that the index is used, and
        # no more of it is read.
        by_end = table.c.principal_digest, table.c.ended_at
        some = (
            sa.select(table.c.key).where(anonymous).order_by(*by_end).limit(sa.bindparam("at_most", type_=sa.Integer))
        )
        self._count_anonymous = dialect.precompiled(sa.select(sa.func.count()).select_from(some.subquery("some")))
        long_ago = sa.select(StoreClock(-MIN_TOMBSTONE.total_seconds())).scalar_subquery()
        removable = (
            sa.select(table.c.key)
            .where(anonymous, table.c.ended_at <= long_ago)
            .order_by(*by_end)
            .limit(sa.bindparam("at_most", type_=sa.Integer))
            .with_for_update(skip_locked=True)
        )
        self._remove_anonymous = dialect.precompiled(
            sa.delete(table).where(dialect.is_one_of(table.c.key, removable)).returning(table.c.key, table.c.revision)
        )

    def concern(self, sessions: Collection[NewSession]) -> bool:
        """Return whether the policy may refuse any of these sessions, or end others for them."""
        if self._retention.per_principal is None and self._retention.anonymous is None:
            return False
        if any(session.principal is not None and self._limit_of(session) is not None for session in sessions):
            return True
        anonymous = sum(session.principal is None for session in sessions)
        if not anonymous or self._retention.anonymous is None:
            return False
        if anonymous <= self._spare and time.monotonic() < self._spare_until:
            self._spare -= anonymous
            return False
        return True

    def _limit_of(self, session: NewSession) -> int | None:
        return self._retention.anonymous if session.principal is None else self._retention.per_principal

    def lock(self, sessions: Collection[NewSession]) -> Steps[None]:
        """Wait for others that create sessions of the same principals, and make them wait until the commit."""
        if self._lock is not None:
            numbers = sorted({self._number(session) for session in sessions if self._limit_of(session) is not None})
            yield self._lock, self._locks.parameters([(number,) for number in numbers])

    def _number(self, session: NewSession) -> int:
        digest = b"" if session.principal is None else session.principal.digest
        text = hashlib.sha256(b"\0".join((b"mcp_session", self._namespace.encode(), digest)))
        return int.from_bytes(text.digest()[:8], signed=True)

    def uncreated(self, sessions: Sequence[NewSession]) -> Steps[list[NewSession]]:
        """Return the sessions whose keys are free in all namespaces: the others are not created and need no room."""
        keys = [self._dialect.driver_key(session.key) for session in sessions]
        rows = yield self._present, self._keys.parameters([(key,) for key in keys])
        present = {row[0] for row in rows}
        return [session for key, session in zip(keys, sessions, strict=True) if key not in present]

    def refuse(
        self, new: Sequence[NewSession]
    ) -> Steps[tuple[dict[UUID, SessionLimitReached], list[tuple[object, int]]]]:
        """Refuse the sessions for which there is no room.

        Returns:
            The refusals by key, and the driver's keys and revisions of tombstones that were removed to make room.
        """
        anonymous = [session for session in new if session.principal is None]
        refused: dict[UUID, SessionLimitReached] = {}
        removed: list[tuple[object, int]] = []
        if anonymous and self._retention.anonymous is not None:
            room, removed = yield from self._make_room(len(anonymous), self._retention.anonymous)
            for session in anonymous[room:]:
                refused[session.key] = SessionLimitReached(
                    f"{self._retention.anonymous} sessions without a principal are stored, as many as the policy's "
                    "anonymous allows"
                )
        if self._retention.per_principal is not None and self._retention.per_principal_excess == "refuse":
            refused |= yield from self._refuse_principals(new, self._retention.per_principal)
        return refused, removed

    def _make_room(self, wanted: int, limit: int) -> Steps[tuple[int, list[tuple[object, int]]]]:
        if time.monotonic() < self._full_until:
            return 0, []
        ((stored,),) = yield self._count_anonymous, {"at_most": limit + 1}
        room = limit - stored
        removed: list[tuple[object, int]] = []
        if 0 <= room < wanted:
            # Some more at once, where the next count would take long.
            rows = yield self._remove_anonymous, {"at_most": wanted - room + limit // MANY}
            removed = [(key, revision) for key, revision in rows]
            room += len(removed)
        now = time.monotonic()
        self._spare = max(0, room - wanted) // 100
        self._spare_until = now + SPARE_FOR
        if room <= 0 and limit > MANY:
            self._full_until = now + FULL_FOR
        return max(0, room), removed

    def _refuse_principals(self, new: Sequence[NewSession], limit: int) -> Steps[dict[UUID, SessionLimitReached]]:
        refused = {}
        if digests := _digests(new):
            rows = yield self._count, self._principals.parameters(digests)
            live: dict[str, int] = {digest: count for digest, count in rows}  # noqa: C416 - the rows are sequences
            for session in new:
                if session.principal is None:
                    continue
                digest = session.principal.digest.hex()
                live[digest] = live.get(digest, 0) + 1
                if live[digest] > limit:
                    refused[session.key] = SessionLimitReached(
                        f"the principal has {limit} sessions, as many as the policy's per_principal allows"
                    )
        return refused

    def excess(self, created: Sequence[NewSession]) -> Steps[list[Any]]:
        """Return the sessions that end because these were created: of each principal, those not seen for longest.

        Returns:
            The driver's keys.
        """
        digests, kept = _digests(created), self._retention.per_principal
        if not digests or kept is None or self._retention.per_principal_excess != "end_oldest":
            return []
        keys = self._keys.parameters([(self._dialect.driver_key(session.key),) for session in created])
        rows = yield self._excess, self._principals.parameters(digests) | keys | {"kept": kept}
        return [row[0] for row in rows]


def _digests(sessions: Sequence[NewSession]) -> list[tuple[Any, ...]]:
    return sorted({(session.principal.digest.hex(),) for session in sessions if session.principal is not None})
