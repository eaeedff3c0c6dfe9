"""The record of a session, for the principal that may see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

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


class Lookup:
    """Looks up sessions for their principals.

    Args:
        store: The store that keeps the sessions.
    """

    __slots__ = ("_store",)

    def __init__(self, store: PatientStore) -> None:
        self._store = store

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
