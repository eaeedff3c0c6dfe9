"""The record of a session, for the principal that may see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.responses import SessionNotFound, WhyNotFound
from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.records import Principal
from mcp_session_store.store import Absence

if TYPE_CHECKING:
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext

    from mcp_session_store.adapter.outage import Waits
    from mcp_session_store.adapter.sessions.patient_store import PatientStore
    from mcp_session_store.records import SessionRecord

__all__ = ["Lookup", "principal_of"]


OF_ANOTHER: Final[WhyNotFound] = "another principal"
"""Reason for which a request is refused that is not of the session's principal."""
HOLDS_FOR: Final = 1.0
"""Most seconds for which a check of a session that is not in memory holds."""
MAX_CHECKED: Final = 10_000
"""Highest number of sessions whose checks are remembered."""


@dataclass(frozen=True, slots=True)
class _Checked:
    principal: Principal | None
    until: float
    """Moment, by `clock`, up to which the check holds."""


class Lookup:
    """Looks up sessions for their principals.

    Args:
        store: The store that keeps the sessions.
        end_within: See `InstanceSettings`.
    """

    __slots__ = ("_checked", "_forgotten", "_holds_for", "_store")

    def __init__(self, store: PatientStore, *, end_within: float) -> None:
        self._store = store
        self._holds_for = min(HOLDS_FOR, end_within)
        self._checked: dict[UUID, _Checked] = {}
        self._forgotten = 0

    async def check(self, key: UUID, requestor: AuthorizationContext | None, waits: Waits) -> SessionRecord | None:
        """Check that a session is live and this principal's, where that was not found a moment ago.

        A check holds for a second, for `end_within` and for the life of the session, whichever is shortest. So of a
        client's messages that follow each other closely one asks the store.

        Args:
            key: Key of the session.
            requestor: Principal that asks for it.
            waits: Request that waits for the answer.

        Returns:
            The record of the session; `None`: the last check holds.

        Raises:
            SessionNotFound: There is no such session for this principal.
            RecordUnreadable: The record of the session cannot be read, and may be this principal's.
            SessionStoreError: The store did not answer.
        """
        began, forgotten = clock.now(), self._forgotten
        checked = self._checked.get(key)
        if checked is not None and began <= checked.until and checked.principal == principal_of(requestor):
            return None
        record = await self.record_of(key, requestor, waits)
        # One that was never used is about to expire, and is looked up until it is.
        if self._forgotten == forgotten and record.loaded_at is not None and record.last_seen_at > record.created_at:
            holds_for = self._holds_for
            if record.expires_at is not None:
                holds_for = min(holds_for, (record.expires_at - record.loaded_at).total_seconds())
            self._checked.pop(key, None)
            self._checked[key] = _Checked(record.principal, began + holds_for)
            self._drop_old(began)
        return record

    def forget(self, key: UUID) -> None:
        """Have the next check ask the store, and one that is under way not be remembered: the session has ended."""
        self._checked.pop(key, None)
        self._forgotten += 1

    def _drop_old(self, now: float) -> None:
        """Drop checks that hold no more, in the order in which they were made, and those that are too many."""
        while self._checked:
            oldest = next(iter(self._checked))
            if self._checked[oldest].until >= now and len(self._checked) <= MAX_CHECKED:
                break
            del self._checked[oldest]

    async def record_of(self, key: UUID, requestor: AuthorizationContext | None, waits: Waits) -> SessionRecord:
        """Return the record of a live session.

        Args:
            key: Key of the session.
            requestor: Principal that asks for it.
            waits: Request that waits for the answer.

        Raises:
            SessionNotFound: There is no such session for this principal.
            RecordUnreadable: The record of the session cannot be read, and may be this principal's.
            SessionStoreError: The store did not answer.
        """
        principal = principal_of(requestor)
        try:
            record = await self._store.find(key, waits)
        except RecordUnreadable as error:
            if error.digest_known and error.digest != (None if principal is None else principal.digest):
                raise SessionNotFound(OF_ANOTHER) from None
            raise
        if isinstance(record, Absence):
            raise SessionNotFound(record.value)
        if record.principal != principal:
            raise SessionNotFound(OF_ANOTHER)
        return record


def principal_of(requestor: AuthorizationContext | None) -> Principal | None:
    """Return the principal of a request, as records hold it; `None` for an anonymous one."""
    return None if requestor is None else Principal.of(**requestor)
