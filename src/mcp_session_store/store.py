"""The contract of a session store: what an adapter may rely on, whatever is underneath."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.errors import ConfigurationError, InvalidValue
from mcp_session_store.records import check_texts
from mcp_session_store.retention import RetentionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime
    from types import TracebackType
    from typing import Self
    from uuid import UUID

    from mcp_session_store.records import (
        Activity,
        Changes,
        EndReason,
        JournalEntry,
        NewSession,
        SessionRecord,
    )
    from mcp_session_store.retention import SweepReport

__all__ = [
    "DEFAULT_NAMESPACE",
    "MAX_JOURNAL_ENTRIES",
    "SWEEP_LIMIT",
    "SessionStore",
    "Store",
    "checked_namespace",
]

DEFAULT_NAMESPACE: Final = "default"

MAX_JOURNAL_ENTRIES: Final = 1000
"""Entries that the journal of a session may hold."""

SWEEP_LIMIT: Final = 100
"""Sessions that one step of a sweep handles at most, unless it is told otherwise."""


def checked_namespace(namespace: str) -> str:
    """Return a namespace that can be stored.

    Raises:
        ConfigurationError: The namespace is not a text, is empty, or holds a NUL or a lone surrogate.
    """
    try:
        if isinstance(namespace, str) and namespace:
            check_texts(namespace=namespace)
            return namespace
    except InvalidValue:
        pass
    raise ConfigurationError(
        f"namespace={namespace!r} must be a text that is not empty, without NUL or lone surrogates"
    )


class Store(ABC):
    """What is opened and closed, and belongs to a namespace."""

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


class SessionStore(Store):
    """Keeps session records, for any number of instances at once.

    A store sees keys (`session_key`), never session ids, and only the sessions of its own namespace:
    to every method a session of another namespace is one that does not exist. A session is *live*
    when it was created, has not ended, and has not expired. Which is decided by one clock, the
    store's own; an ended session never becomes live again, and an expired one only when activity from before its
    expiry is reported.

    The rules for all methods:

    * Concurrency: they may be called at any time, by many tasks and instances at once, and take
      effect one after the other in some order.
    * Failure: `StoreUnavailable` when the store cannot be reached or does not answer within a bound
      of seconds that it sets itself; `SchemaError` when what is there does not fit. The call may or
      may not have taken effect. Each one is idempotent, so that calling it again is right.
    * Cancellation: as failure. A call that is cancelled disturbs no other call.
    * Values: `InvalidValue` when a text that is to be stored holds a NUL or a lone surrogate (`check_texts` of
      `mcp_session_store.records`), or when the store refuses a value for a reason of its own, such as its length.
      Nothing of that call is stored, and no other call is affected. `create`, `claim`, `replace_initialize` and
      `write_journal` raise it.
    * A store is used within one event loop.

    Args:
        retention: How long sessions live, and how many there may be; the default policy unless given.
    """

    def __init__(self, *, retention: RetentionPolicy | None = None) -> None:
        self._retention = RetentionPolicy() if retention is None else retention

    @property
    def retention(self) -> RetentionPolicy:
        """How long sessions live, and how many there may be. May be set before the store is used."""
        return self._retention

    @retention.setter
    def retention(self, policy: RetentionPolicy) -> None:
        self._retention = policy

    @abstractmethod
    async def create(self, session: NewSession) -> SessionRecord:
        """Store a new session; durable when this returns.

        The record lives for the policy's `new_session_lifetime`. To create the same session again changes
        nothing and returns the record. Where the policy says so, another session of the principal ends by it.

        Raises:
            SessionConflict: Another record stands under this key, or the session has ended.
            SessionLimitReached: The policy allows no more sessions of this principal, or without one.
        """

    @abstractmethod
    async def load(self, key: UUID) -> SessionRecord | None:
        """The record of a live session; `None` for one that is unknown, ended or expired."""

    @abstractmethod
    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        """Note that an instance restored the session, and return the record as it then is.

        Sets the instance hint, counts the restore, and is an activity: `last_seen_at` is now, and the session
        expires as the policy says from now on. When several instances claim one session, each restore
        counts and the last one is the hint.

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

        Raises the revision, and is a change. Returns False when the session is not live, and then nothing
        is changed.
        """

    @abstractmethod
    async def write_journal(self, key: UUID, *, method: str, subject: str, params: str | None) -> int | None:
        """Set or remove one entry of a session's journal.

        Raises the revision, and is a change. A call that is repeated after a failure may raise it twice.

        Args:
            key: The session.
            method: The method that is to be replayed.
            subject: What the state is about; method and subject name the entry.
            params: The call's `params`, as JSON text; `None` removes the entry, if there is one.

        Returns:
            The session's revision, or `None` when it is not live, and then nothing is changed.

        Raises:
            JournalFull: There are `MAX_JOURNAL_ENTRIES` already, and this would be one more.
        """

    @abstractmethod
    async def read_journal(self, key: UUID) -> Sequence[JournalEntry]:
        """The journal of a session, in the order in which the entries were last set; empty for an unknown one.

        A session whose revision is 0 has none.
        """

    @abstractmethod
    async def touch(self, activities: Sequence[Activity]) -> set[UUID]:
        """Record activity of any number of sessions in one statement.

        A session is extended when its first reported activity lies before its expiry, even if the
        report comes after it; `last_seen_at` never goes back. It then expires as the policy says from its
        `last_seen_at` on.

        Returns:
            The keys among them of sessions that are not live afterwards: ended, expired, unknown.
        """

    @abstractmethod
    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        """End a session for good. It is a change. What is kept is a tombstone, without the params.

        Returns:
            True when the session was live and is now ended. False when it was not live, and then
            nothing is changed.
        """

    @abstractmethod
    async def changes(self, since: datetime | None) -> Changes:
        """What copies of sessions must learn: sessions that ended, and that have a new revision.

        Sessions that expired are not among them: an instance knows when its own will.

        Args:
            since: `until` of the call before. No change that was committed after that call is
                missing; one may be told again. `None` tells nothing but where to go on.
        """

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:  # noqa: ARG002
        """Pass on hints that something changed, until cancelled.

        A hint may come late, twice, or never; `changes` tells the truth. A store that has no hints waits for
        ever, as this one does.

        Args:
            on_hint: Called with the keys of sessions that changed, or with `None` for any.

        Raises:
            StoreUnavailable: Hints come no more; calling again is right.
        """
        await anyio.sleep_forever()

    @abstractmethod
    async def sweep(self, *, limit: int = SWEEP_LIMIT) -> SweepReport:
        """Do one short step of what is to be swept, by the policy: the caller goes on while there is `more`.

        Sessions that expired end, after the policy's `sweep_grace`, within which a last activity can still
        be reported; those that ended a `tombstone` ago are removed for good. Live sessions that have no
        expiry, because the policy had no limit when they were last used, are given one as if they were used now.
        Any number of instances may do so at once: none waits for another, and no session is handled twice.

        Args:
            limit: Sessions that are handled at most, of each kind.
        """
