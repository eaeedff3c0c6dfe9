"""The contracts on a SQL database, however it is reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore, SqlStateStore
from mcp_session_store.store import DEFAULT_NAMESPACE
from mcp_session_store.testing import (
    EventLogConformance,
    MailboxConformance,
    MakeLog,
    MakeMailbox,
    MakeState,
    MakeStore,
    SessionStoreConformance,
    StateStoreConformance,
)
from tests.support.databases import (
    age_events,
    age_instance,
    age_messages,
    age_state,
    age_tombstone,
    empty,
    expire,
    settled,
    stored_state,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.event_log import EventLog
    from mcp_session_store.mailbox import Mailbox
    from mcp_session_store.retention import EventPolicy, StatePolicy
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore

PATIENCE = 30.0
"""Seconds that a call may take: SQLite's writers wait for one another, on a machine that has more to do."""

__all__ = ["SqlEventLogConformance", "SqlMailboxConformance", "SqlStateConformance", "SqlStoreConformance"]


class SqlStoreConformance(SessionStoreConformance):
    """Subclass it, and give the fixture `contract_url`."""

    @pytest.fixture
    def contract_url(self) -> str:
        """The URL of a migrated database, which each test empties."""
        raise NotImplementedError("override the fixture contract_url")

    @pytest.fixture
    async def make_store(self, anyio_backend: str, contract_url: str) -> AsyncIterator[MakeStore]:
        await empty(contract_url)
        stores: list[SqlSessionStore] = []

        def make(namespace: str) -> SessionStore:
            stores.append(SqlSessionStore(contract_url, namespace=namespace, timeout=PATIENCE))
            return stores[-1]

        yield make
        for store in stores:
            await settled(store)
            await store.aclose()

    async def expire(self, store: SessionStore, key: UUID) -> None:
        await expire(store, key)

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        await age_tombstone(store, key)


class SqlEventLogConformance(EventLogConformance):
    """Subclass it, and give the fixture `contract_url`."""

    @pytest.fixture
    def contract_url(self) -> str:
        """The URL of a migrated database, which each test empties."""
        raise NotImplementedError("override the fixture contract_url")

    @pytest.fixture
    async def make_log(self, anyio_backend: str, contract_url: str) -> AsyncIterator[MakeLog]:
        await empty(contract_url)
        made: list[tuple[SqlSessionStore, SqlEventLog]] = []

        def make(
            namespace: str = DEFAULT_NAMESPACE, *, policy: EventPolicy | None = None
        ) -> tuple[SessionStore, EventLog]:
            store = SqlSessionStore(contract_url, namespace=namespace, timeout=PATIENCE)
            made.append((store, SqlEventLog(store, policy=policy)))
            return made[-1]

        yield make
        for store, log in made:
            await settled(store, log)
            await log.aclose()
            await store.aclose()

    async def expire(self, store: SessionStore, key: UUID) -> None:
        await expire(store, key)

    async def age_events(self, log: EventLog, key: UUID) -> None:
        await age_events(log, key)


class SqlMailboxConformance(MailboxConformance):
    """Subclass it, and give the fixture `contract_url`."""

    @pytest.fixture
    def contract_url(self) -> str:
        """The URL of a migrated database, which each test empties."""
        raise NotImplementedError("override the fixture contract_url")

    @pytest.fixture
    async def make_mailbox(self, anyio_backend: str, contract_url: str) -> AsyncIterator[MakeMailbox]:
        await empty(contract_url)
        made: list[tuple[SqlSessionStore, SqlMailbox]] = []

        def make(namespace: str = DEFAULT_NAMESPACE) -> tuple[SessionStore, Mailbox]:
            store = SqlSessionStore(contract_url, namespace=namespace, timeout=PATIENCE)
            made.append((store, SqlMailbox(store)))
            return made[-1]

        yield make
        for store, mailbox in made:
            await settled(store, mailbox)
            await mailbox.aclose()
            await store.aclose()

    async def expire(self, store: SessionStore, key: UUID) -> None:
        await expire(store, key)

    async def age_instance(self, mailbox: Mailbox, instance: str, by: timedelta) -> None:
        await age_instance(mailbox, instance, by)

    async def age_messages(self, mailbox: Mailbox, by: timedelta) -> None:
        await age_messages(mailbox, by)


class SqlStateConformance(StateStoreConformance):
    """Subclass it, and give the fixture `contract_url`."""

    @pytest.fixture
    def contract_url(self) -> str:
        """The URL of a migrated database, which each test empties."""
        raise NotImplementedError("override the fixture contract_url")

    @pytest.fixture
    async def make_state(self, anyio_backend: str, contract_url: str) -> AsyncIterator[MakeState]:
        await empty(contract_url)
        made: list[tuple[SqlSessionStore, SqlStateStore]] = []

        def make(
            namespace: str = DEFAULT_NAMESPACE, *, policy: StatePolicy | None = None
        ) -> tuple[SessionStore, StateStore]:
            store = SqlSessionStore(contract_url, namespace=namespace, timeout=PATIENCE)
            made.append((store, SqlStateStore(store, policy=policy)))
            return made[-1]

        yield make
        for store, state in made:
            await settled(store, state)
            await state.aclose()
            await store.aclose()

    async def expire(self, store: SessionStore, key: UUID) -> None:
        await expire(store, key)

    async def age_state(self, state: StateStore, key: UUID, by: float) -> None:
        await age_state(state, key, by)

    async def left(self, state: StateStore, key: UUID) -> int:
        return len(await stored_state(state, key))
