"""The calls of the store that requests make, each of which waits while the store is away."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mcp_session_store.adapter.outage import WAITED_FOR
from mcp_session_store.store import Absence

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from uuid import UUID

    from mcp_session_store.adapter.outage import Gate, Waits
    from mcp_session_store.records import EndReason, JournalEntry, NewSession, SessionRecord
    from mcp_session_store.store import SessionStore

__all__ = ["PatientStore", "wait_if_away"]

_T = TypeVar("_T")


class PatientStore:
    """Calls of a store for requests, each of which waits while the store is away.

    Args:
        inner: The store.
        gate: Where they wait.
    """

    __slots__ = ("gate", "inner")

    def __init__(self, inner: SessionStore, gate: Gate) -> None:
        self.inner = inner
        """The store itself, for calls that do not wait."""
        self.gate = gate

    async def find(self, key: UUID, waits: Waits) -> SessionRecord | Absence:
        """See `SessionStore.find`."""
        gate = self.gate
        failures = 0
        if gate.is_open:
            outage = gate.outages
            try:
                return await self.inner.find(key)
            except WAITED_FOR as error:
                gate.failed(error, outage)
                failures = 1
        return await gate.answer_to(lambda: self.inner.find(key), waits, failures=failures)

    async def create(self, session: NewSession, waits: Waits) -> SessionRecord:
        """See `SessionStore.create`."""
        gate = self.gate
        failures = 0
        if gate.is_open:
            outage = gate.outages
            try:
                return await self.inner.create(session)
            except WAITED_FOR as error:
                gate.failed(error, outage)
                failures = 1
        return await gate.answer_to(lambda: self.inner.create(session), waits, failures=failures)

    async def claim(self, key: UUID, waits: Waits, *, instance: str, restores: int) -> SessionRecord | None:
        """See `SessionStore.claim`."""
        gate = self.gate
        failures = 0
        if gate.is_open:
            outage = gate.outages
            try:
                return await self.inner.claim(key, instance=instance, restores=restores)
            except WAITED_FOR as error:
                gate.failed(error, outage)
                failures = 1
        return await gate.answer_to(
            lambda: self.inner.claim(key, instance=instance, restores=restores), waits, failures=failures
        )

    async def read_journal(self, key: UUID, waits: Waits) -> Sequence[JournalEntry]:
        """See `SessionStore.read_journal`."""
        return await wait_if_away(self.gate, lambda: self.inner.read_journal(key), waits)

    async def end(self, key: UUID, waits: Waits, *, reason: EndReason) -> bool:
        """See `SessionStore.end`."""
        tries = 0

        async def end() -> bool:
            nonlocal tries
            tries += 1
            return await self.inner.end(key, reason=reason)

        ended = await wait_if_away(self.gate, end, waits)
        if not ended and tries > 1:
            # An earlier try may have ended it, if its commit succeeded and the answer was lost.
            found = await self.find(key, waits)
            return found is Absence.ENDED
        return ended

    async def replace_initialize(
        self,
        key: UUID,
        waits: Waits,
        *,
        initialize_params: str,
        protocol_version: str,
        client_name: str,
        client_version: str,
    ) -> bool:
        """See `SessionStore.replace_initialize`."""
        return await wait_if_away(
            self.gate,
            lambda: self.inner.replace_initialize(
                key,
                initialize_params=initialize_params,
                protocol_version=protocol_version,
                client_name=client_name,
                client_version=client_version,
            ),
            waits,
        )


async def wait_if_away(gate: Gate, call: Callable[[], Awaitable[_T]], waits: Waits) -> _T:
    """Make a call of a store, and while that is away make it again, as long as the request may wait for it."""
    failures = 0
    if gate.is_open:
        outage = gate.outages
        try:
            return await call()
        except WAITED_FOR as error:
            gate.failed(error, outage)
            failures = 1
    return await gate.answer_to(call, waits, failures=failures)
