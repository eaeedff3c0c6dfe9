"""The contract of a session store: what an adapter may rely on, whatever is underneath."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self
    from uuid import UUID

    from mcp_session_store.records import Activity, EndReason, NewSession, SessionRecord

__all__ = ["DEFAULT_NAMESPACE", "NEW_SESSION_LIFETIME", "SessionStore"]

DEFAULT_NAMESPACE: Final = "default"

NEW_SESSION_LIFETIME: Final = timedelta(minutes=10)
"""How long a new record lives unless a first activity, or a claim, follows.

A client that was answered goes on at once (MCP 2025-11-25, basic/lifecycle: `notifications/initialized`
follows `initialize`), so what stays behind is a record whose commit nobody learned of.
"""


class SessionStore(ABC):
    """Keeps session records, for any number of instances at once.

    A store sees keys (`session_key`), never session ids, and only the sessions of its own namespace:
    to every method a session of another namespace is one that does not exist. A session is *live*
    when it was created, has not ended, and has not expired. Which is decided by one clock, the
    store's own; an ended or expired session never becomes live again.

    The rules for all methods:

    * Concurrency: they may be called at any time, by many tasks and instances at once, and take
      effect one after the other in some order.
    * Failure: `StoreUnavailable` when the store cannot be reached or does not answer within a bound
      of seconds that it sets itself; `SchemaError` when what is there does not fit. The call may or
      may not have taken effect. Each one is idempotent, so that calling it again is right.
    * Cancellation: as failure. A call that is cancelled disturbs no other call.
    * A store is used within one event loop.
    """

    @property
    @abstractmethod
    def namespace(self) -> str:
        """What keeps servers that share a database apart."""

    async def open(self) -> None:
        """Make contact and check that what is there fits. May be called again, and need not be called.

        Raises:
            StoreUnavailable: It cannot be reached now. The store stays usable and recovers by itself.
            SchemaError: The schema does not fit; the message names the command to run.
        """
        return

    async def aclose(self) -> None:
        """Release connections and tasks. Calls that wait end with `StoreUnavailable`. Idempotent."""
        return

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def create(self, session: NewSession) -> SessionRecord:
        """Store a new session; durable when this returns.

        The record lives for `NEW_SESSION_LIFETIME`. To create the same session again changes nothing
        and returns the record.

        Raises:
            SessionConflict: Another record stands under this key, or the session has ended.
        """

    @abstractmethod
    async def load(self, key: UUID) -> SessionRecord | None:
        """The record of a live session; `None` for one that is unknown, ended or expired."""

    @abstractmethod
    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        """Note that an instance restored the session, and return the record as it then is.

        Sets the instance hint, counts the restore, and is an activity. When several instances claim
        one session, each restore counts and the last one is the hint.

        Args:
            key: The session.
            instance: The instance that restored it.
            restores: `restores` of the record that the restore began from: what makes it one claim,
                however often it is called.

        Returns:
            The record, or `None` when the session is not live, and then nothing is changed.
        """

    @abstractmethod
    async def replace_initialize(
        self,
        key: UUID,
        *,
        initialize_params: str,
        protocol_version: str,
        client_name: str,
        client_version: str,
    ) -> bool:
        """Replace what a restore replays, because the client initialized again within its session.

        Raises the revision. Returns False when the session is not live, and then nothing is changed.
        """

    @abstractmethod
    async def touch(self, activities: Sequence[Activity]) -> set[UUID]:
        """Record activity of any number of sessions in one statement.

        A session is extended when its first reported activity lies before its expiry, even if the
        report comes after it; `last_seen_at` never goes back.

        Returns:
            The keys among them of sessions that are not live: ended, expired, unknown.
        """

    @abstractmethod
    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        """End a session for good.

        Returns:
            True when the session was live and is now ended. False when it was not live, and then
            nothing is changed.
        """
