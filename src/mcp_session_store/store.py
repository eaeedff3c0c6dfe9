"""The contract of a session store: what callers may rely on, and an implementation has to do."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import anyio

from mcp_session_store.errors import ConfigurationError, InvalidValue
from mcp_session_store.records import check_texts
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.settings import checked_type

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime
    from types import TracebackType
    from typing import Self

    from mcp_session_store.activity import Activity, Touched
    from mcp_session_store.records import (
        Changes,
        EndReason,
        JournalEntry,
        NewSession,
        SessionRecord,
    )
    from mcp_session_store.retention import SweepReport

__all__ = [
    "DEFAULT_NAMESPACE",
    "LEAST_SWEEP",
    "MAX_JOURNAL_ENTRIES",
    "SWEEP_LIMIT",
    "Absence",
    "SessionStore",
    "Store",
    "check_keys",
    "checked_namespace",
    "read_params",
]

DEFAULT_NAMESPACE: Final = "default"
"""Namespace of a store that is given none."""

MAX_JOURNAL_ENTRIES: Final = 1000
"""Most entries that the journal of a session may hold."""

SWEEP_LIMIT: Final = 100
"""Most sessions of each kind that one step of a sweep handles, unless `limit` is given."""

LEAST_SWEEP: Final = 25
"""Smallest limit of a step that is worth its price: a transaction costs as much as the end of many sessions."""


class Absence(StrEnum):
    """Why there is no live session under a key. Clients never learn which."""

    UNKNOWN = "unknown"
    """There is no record; or the store does not say why."""
    ENDED = "ended"
    EXPIRED = "expired"


def check_keys(*keys: object) -> None:
    """Refuse keys of sessions that are none.

    Raises:
        ConfigurationError: A key is no UUID; the message does not quote it, because it may be a session id.
    """
    for key in keys:
        if not isinstance(key, UUID):
            raise ConfigurationError(
                f"the key of a session must be a UUID, as session_key() makes it of a session id, not a "
                f"{type(key).__name__}"
            )


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


def read_params(text: object) -> dict[str, Any] | None:
    """Return the stored params of a message: a JSON object, or `None` for a message without params.

    Raises:
        ValueError: The text holds neither. The error does not quote it.
    """
    try:
        params = json.loads(text) if isinstance(text, str) else ""
    except (ValueError, RecursionError):
        params = ""
    if params is None or isinstance(params, dict):
        return params
    # Not raised from here: the error of the decoder would hold the text.
    raise ValueError("the params are no JSON object")


class Store(ABC):
    """A resource of one namespace, which is opened before its use and closed after it."""

    @property
    @abstractmethod
    def namespace(self) -> str:
        """Name that keeps servers apart which share a database."""

    async def open(self) -> None:
        """Connect, and check that the stored schema fits. May be called more than once, and may be left out.

        Raises:
            StoreUnavailable: The database cannot be reached now. The store stays usable and recovers by itself.
            StoreMisconfigured: The database cannot be used as it is set up; the message says what to change.
            SchemaError: The schema does not fit; the message names the command to run.
        """
        return

    async def aclose(self) -> None:
        """Release connections and tasks. Waiting calls fail with `StoreClosed`. May be called more than once."""
        return

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            # A context that is not entered is not left.
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class SessionStore(Store):
    """Store of session records, shared by any number of instances.

    A store sees keys (`session_key`), never session ids, and only the sessions of its own namespace:
    to every method a session of another namespace is one that does not exist. A session is *live*
    when it was created, has not ended, and has not expired. Expiry is decided by one clock, the
    store's own; an ended session never becomes live again, and an expired one only when activity from before its
    expiry is reported.

    The rules for all methods:

    * Concurrency: methods may be called at any time, by many tasks and instances at once, and take
      effect one after the other in some order.
    * Failure: `StoreUnavailable` when the store is away, which means that it cannot be reached or does not answer
      within a bound of seconds that it sets itself, and for nothing else, because callers wait until it is back and
      repeat the call; `StoreMisconfigured` when it cannot be used as it is set up, such as with a wrong password or
      without a privilege, which callers wait for as well, because it may be set right; `StoreBusy` when it cannot take
      the call now, such as when too many wait; `StoreClosed` after `aclose`; `SchemaError` when the stored schema does
      not fit. The call may or may not have taken effect. Each call is idempotent, so that it may be repeated.
    * Unreadable: `RecordUnreadable` where what is stored of the session cannot be read, as after a change by hand. So
      do `load`, `claim` and `read_journal`. No other session is affected, and no other method fails for it.
    * Cancellation: as failure. A cancelled call disturbs no other call.
    * Values: `InvalidValue` when a text to be stored holds a NUL or a lone surrogate (`check_texts` of
      `mcp_session_store.records` finds them), or when the store refuses a value for a reason of its own, such as its
      length. Nothing of that call is stored, and no other call is affected. `create`, `claim`, `replace_initialize`,
      `write_journal` and `touch` raise it. A key that is no UUID is a `ConfigurationError` of every method
      (`check_keys`), and disturbs no other call.
    * Event loop: all calls of one store are made in the same loop.

    Args:
        retention: Lifetimes of sessions and limits on their number; the default policy unless given.
    """

    def __init__(self, *, retention: RetentionPolicy | None = None) -> None:
        self._retention = RetentionPolicy() if retention is None else self._checked_policy(retention)

    @property
    def retention(self) -> RetentionPolicy:
        """Lifetimes of sessions and limits on their number. May be set before the store is used."""
        return self._retention

    @retention.setter
    def retention(self, policy: RetentionPolicy) -> None:
        self._retention = self._checked_policy(policy)

    @staticmethod
    def _checked_policy(policy: RetentionPolicy) -> RetentionPolicy:
        checked_type("retention", policy, RetentionPolicy, "a RetentionPolicy")
        return policy

    @abstractmethod
    async def create(self, session: NewSession) -> SessionRecord:
        """Store a new session, durably before this returns.

        The record lives for the policy's `new_session_lifetime`. With it, all or nothing, the session's `state` is
        stored by a store that has a `StateStore` beside it. Creating the same session again changes nothing and
        returns the record. With the policy's `per_principal` and `end_oldest`, another session of the principal may
        end by it.

        Raises:
            SessionConflict: There is another record under this key, or the session has ended or expired.
            SessionLimitReached: The policy allows no more sessions of this principal, or without a principal.
            InvalidValue: A text of the session cannot be stored.
        """

    @abstractmethod
    async def load(self, key: UUID) -> SessionRecord | None:
        """Return the record of a live session, or `None` for one that is unknown, ended or expired.

        The record's `loaded_at` is the present time by the store's clock. A store that leaves it out is asked to
        `claim` each restore before the session is served, instead of learning of it by `touch`, and no instance learns
        from it whether a client is active on others. `newest_event` may be left out by a store that has no event log,
        see `EventLog.is_of`, and `watched` by one without a `StateStore`; `claim` returns it, too.
        """

    async def find(self, key: UUID) -> SessionRecord | Absence:
        """Return what `load` returns, or why there is no live session: for metrics and logs, and not for clients.

        A store that knows the reason says it at no further cost, so that the time of the answer does not tell.
        """
        record = await self.load(key)
        return Absence.UNKNOWN if record is None else record

    @abstractmethod
    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        """Record that an instance restored the session, and return the changed record.

        A claim sets the instance hint, counts the restore, and is an activity: `last_seen_at` becomes now, and the
        session expires as the policy says from now on. When several instances claim one session, each restore
        counts and the last instance is the hint. An activity that is reported to `touch` may claim as well: that is
        how most restores are claimed.

        Args:
            key: Key of the session.
            instance: Id of the instance that restored it.
            restores: `restores` of the record that the restore began from. A claim that is repeated with the
                same number and instance counts once.

        Returns:
            The record, or `None` when the session is not live; then nothing is changed.

        Raises:
            InvalidValue: The instance's id cannot be stored.
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
        """Replace the handshake that a restore replays, because the client initialized again within its session.

        This raises the revision, and `changes` returns it.

        Returns:
            True when the handshake is replaced. False when the session is not live; then nothing is changed.

        Raises:
            InvalidValue: A text cannot be stored.
        """

    @abstractmethod
    async def write_journal(self, key: UUID, *, method: str, subject: str, params: str | None) -> int | None:
        """Set or remove one entry of a session's journal.

        This raises the revision, and `changes` returns it. A call that is repeated after a failure may raise the
        revision twice.

        Args:
            key: Key of the session.
            method: Method to be replayed.
            subject: Object of the state; method and subject name the entry.
            params: The call's `params`, as JSON text; `None` removes the entry, if there is one.

        Returns:
            The session's new revision, or `None` when the session is not live; then nothing is changed.

        Raises:
            JournalFull: The journal has `MAX_JOURNAL_ENTRIES` already, and this would be one more.
            InvalidValue: A text cannot be stored.
        """

    @abstractmethod
    async def read_journal(self, key: UUID) -> Sequence[JournalEntry]:
        """Return the journal of a session in the order in which the entries were last set, with their revisions.

        The journal of a session that is not live is empty, and so is that of one whose revision is 0.
        """

    @abstractmethod
    async def touch(self, activities: Sequence[Activity]) -> Touched:
        """Record activity of any number of sessions at once.

        A session is extended when its first reported activity lies before its expiry, even if the
        report comes after the expiry; `last_seen_at` never goes back. The session then expires as the policy says
        from its `last_seen_at` on. An activity without a use extends nothing, and `last_seen_at` stays.

        Where a session is extended by an activity with `claimed_by`, that instance becomes the hint, and the restores
        are counted: one more where another instance was the hint, and no fewer than the activity's `restores`. So a
        report that is repeated counts once, and each of several instances that claim a session counts.

        The client's GET stream of a session has one holder: the instance on which it was opened last, by the ages of
        the claims (`Activity.stream`). A claim by another instance than the holder takes the stream where it was opened
        later than the holder's: the holder becomes the former one, and the term rises by one. One with the present
        term is the holder's own, under a number that may be new, and nothing else changes; one with another term takes
        nothing. So a report that is repeated has the same answer. Nothing releases a stream.

        Returns:
            Which of the sessions are not live, and the holders of the streams that were claimed.

        Raises:
            InvalidValue: An instance's id cannot be stored.
        """

    @abstractmethod
    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        """End a session for good. `changes` returns the end; a tombstone without the params is kept.

        Returns:
            True when the session was live and is now ended. False when the session was not live; then
            nothing is changed.
        """

    @abstractmethod
    async def changes(self, since: datetime | None) -> Changes:
        """Return the sessions that ended or have a new revision, for the copies that instances hold of them.

        Sessions that expired are not returned, because an instance knows when its own will; but those are that a sweep
        ended although they were used within `MAY_BE_HELD` (of `mcp_session_store.retention`) before.

        Args:
            since: `until` of the previous call. No change that was committed after that call is
                missing; some may be returned again. With `None` no changes are returned, only the time to continue at.
        """

    async def ping(self) -> None:
        """Check that the store can be used now: it answers, and its schema fits. This changes nothing.

        A store that does not override this method asks for changes, of which there are none without a moment to begin
        at.

        Raises:
            SessionStoreError: The store cannot be used, and why, as for every other method.
        """
        await self.changes(None)

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:  # noqa: ARG002
        """Pass on hints that sessions changed, until cancelled.

        Hints may be late, duplicated or lost; `changes` is authoritative. A store without hints waits for ever, as
        this method does.

        Args:
            on_hint: Called with the keys of sessions that changed, or with `None` when any may have changed.

        Raises:
            StoreUnavailable: No more hints will come from this call; it should be repeated.
        """
        await anyio.sleep_forever()

    @abstractmethod
    async def sweep(self, *, limit: int = SWEEP_LIMIT) -> SweepReport:
        """Do one short step of a sweep by the policy. The caller repeats it while the report says `more`.

        Expired sessions end, after the policy's `sweep_grace`, within which a last activity can still
        be reported; tombstones as old as the policy's `tombstone` are removed for good. Live sessions that have no
        expiry, because the policy had no limit when they were last used, are given one as if they were used now.
        Any number of instances may sweep at once: none waits for another, and no session is handled twice.

        Args:
            limit: Most sessions of each kind that this step handles.
        """
