"""The contracts, on everything that implements them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.memory import MemoryEventLog, MemoryMailbox, MemorySessionStore, MemoryStateStore
from mcp_session_store.records import instance_name
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
from tests.support.internals import logs_of, rows_of
from tests.support.sql_contracts import (
    SqlEventLogConformance,
    SqlMailboxConformance,
    SqlStateConformance,
    SqlStoreConformance,
)

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.event_log import EventLog
    from mcp_session_store.mailbox import Mailbox
    from mcp_session_store.retention import EventPolicy, StatePolicy
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


def expire(store: SessionStore, key: UUID) -> None:
    """Make a session of a store in memory have expired a second ago."""
    assert isinstance(store, MemorySessionStore)
    row = rows_of(store)[key]
    row.record = replace(row.record, expires_at=datetime.now(UTC) - timedelta(seconds=1))


class TestMemory(SessionStoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        first = MemorySessionStore()
        return lambda namespace: MemorySessionStore(namespace=namespace, shared_with=first)

    async def expire(self, store: SessionStore, key: UUID) -> None:
        expire(store, key)

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        assert isinstance(store, MemorySessionStore)
        row = rows_of(store)[key]
        assert row.ended is not None
        row.ended_at = datetime.now(UTC) - timedelta(days=2)


class TestSql(SqlStoreConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    def contract_url(self, migrated_url: str) -> str:
        return migrated_url


class TestEventsInMemory(EventLogConformance):
    @pytest.fixture
    def make_log(self) -> MakeLog:
        first = MemorySessionStore()

        def make(
            namespace: str = DEFAULT_NAMESPACE, *, policy: EventPolicy | None = None
        ) -> tuple[SessionStore, EventLog]:
            store = MemorySessionStore(namespace=namespace, shared_with=first)
            return store, MemoryEventLog(store, policy=policy)

        return make

    async def expire(self, store: SessionStore, key: UUID) -> None:
        expire(store, key)

    async def age_events(self, log: EventLog, key: UUID) -> None:
        assert isinstance(log, MemoryEventLog)
        if (stored := logs_of(log).get(key)) is not None:
            long_ago = datetime.now(UTC) - timedelta(days=2)
            stored.events = [(stream, event, long_ago) for stream, event, _ in stored.events]


class TestEventsInSql(SqlEventLogConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    def contract_url(self, migrated_url: str) -> str:
        return migrated_url


class TestMailboxInMemory(MailboxConformance):
    @pytest.fixture
    def make_mailbox(self) -> MakeMailbox:
        first = MemorySessionStore()

        def make(namespace: str = DEFAULT_NAMESPACE) -> tuple[SessionStore, Mailbox]:
            store = MemorySessionStore(namespace=namespace, shared_with=first)
            return store, MemoryMailbox(store)

        return make

    async def expire(self, store: SessionStore, key: UUID) -> None:
        expire(store, key)

    async def age_instance(self, mailbox: Mailbox, instance: str, by: timedelta) -> None:
        assert isinstance(mailbox, MemoryMailbox)
        mailbox.data.instances[instance_name(instance)].beat_at -= by

    async def age_messages(self, mailbox: Mailbox, by: timedelta) -> None:
        assert isinstance(mailbox, MemoryMailbox)
        for mail in mailbox.data.mail.values():
            mail.posted_at -= by
        for of_stream in mailbox.data.stream_mail.values():
            of_stream.stored_at -= by


class TestMailboxInSql(SqlMailboxConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    def contract_url(self, migrated_url: str) -> str:
        return migrated_url


class TestStateInMemory(StateStoreConformance):
    @pytest.fixture
    def make_state(self) -> MakeState:
        first = MemorySessionStore()

        def make(
            namespace: str = DEFAULT_NAMESPACE, *, policy: StatePolicy | None = None
        ) -> tuple[SessionStore, StateStore]:
            store = MemorySessionStore(namespace=namespace, shared_with=first)
            return store, MemoryStateStore(store, policy=policy)

        return make

    async def expire(self, store: SessionStore, key: UUID) -> None:
        expire(store, key)

    async def age_state(self, state: StateStore, key: UUID, by: float) -> None:
        assert isinstance(state, MemoryStateStore)
        for kept in state.data.states[key].values():
            if kept.ends_at is not None:
                kept.ends_at -= timedelta(seconds=by)

    async def left(self, state: StateStore, key: UUID) -> int:
        assert isinstance(state, MemoryStateStore)
        return len(state.data.states.get(key, ()))


class TestStateInSql(SqlStateConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    def contract_url(self, migrated_url: str) -> str:
        return migrated_url
