"""Any interleaving of calls on a SQL store agrees with the contract's reading in memory."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from mcp_session_store.activity import Activity
from mcp_session_store.errors import InvalidValue, SessionConflict, SessionLimitReached
from mcp_session_store.memory import MemorySessionStore
from mcp_session_store.records import EndReason, Principal, SessionRecord
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.testing import new_session
from tests.support.databases import age_tombstone, execute, expire, settled
from tests.support.internals import rows_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from mcp_session_store.store import SessionStore

# Few of each, so that calls meet.
names = st.integers(0, 2)
instances = st.sampled_from(["instance-a", "instance-b"])
claims = st.tuples(instances, st.integers(1, 4))
principals = st.sampled_from([None, Principal.of(client_id="a"), Principal.of(client_id="b")])
params = st.sampled_from(["{}", '{"a": "\\u0000"}', '{"é": 1}', "\0"])
namespaces = st.sampled_from(["one", "two"])
ages = st.sampled_from([0.0, 60.0])
methods = st.sampled_from(["level", "subscribe"])

POLICIES = {
    # A limit, and room for all but one.
    "one": RetentionPolicy(idle=timedelta(hours=2), per_principal=1, per_principal_excess="refuse", anonymous=2),
    "two": RetentionPolicy(idle=None, absolute=timedelta(hours=2)),
}


def timeless(value: Any) -> Any:
    """A result as both stores must give it: of the times, only whether there is an expiry."""
    if not isinstance(value, SessionRecord):
        return value
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    expires_at = None if value.expires_at is None else epoch
    return replace(value, created_at=epoch, last_seen_at=epoch, expires_at=expires_at)


class Interleaving(RuleBasedStateMachine):
    """Each call goes to the model and to the store, and both must answer the same."""

    runner: asyncio.Runner
    stores: dict[str, SqlSessionStore]

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, MemorySessionStore] = {}
        self.keys: list[UUID] = []
        self.began: dict[SessionStore, datetime] = {}

    @initialize()
    def begin(self) -> None:
        first = MemorySessionStore(namespace="one")
        self.models = {"one": first, "two": MemorySessionStore(namespace="two", shared_with=first)}
        self.keys = [uuid.uuid4() for _ in range(3)]
        self.runner.run(execute(self.stores["one"], sa.delete(sessions_table())))
        for stores in (self.models, self.stores):
            for name, store in stores.items():
                store.retention = POLICIES[name]
                self.began[store] = self.runner.run(store.changes(None)).until

    def both(self, namespace: str, call: Callable[[SessionStore], Awaitable[Any]]) -> None:
        async def outcome(store: SessionStore) -> Any:
            try:
                return timeless(await call(store))
            except (SessionConflict, SessionLimitReached, InvalidValue) as error:
                return type(error)

        expected = self.runner.run(outcome(self.models[namespace]))
        assert self.runner.run(outcome(self.stores[namespace])) == expected

    @rule(name=names, namespace=namespaces, instance=instances, principal=principals, text=params)
    def create(self, name: int, namespace: str, instance: str, principal: Principal | None, text: str) -> None:
        session = new_session(key=self.keys[name], instance=instance, principal=principal, initialize_params=text)
        self.both(namespace, lambda store: store.create(session))

    @rule(name=names, namespace=namespaces)
    def load(self, name: int, namespace: str) -> None:
        self.both(namespace, lambda store: store.load(self.keys[name]))

    @rule(name=names, namespace=namespaces, instance=instances, restores=st.integers(0, 3))
    def claim(self, name: int, namespace: str, instance: str, restores: int) -> None:
        self.both(namespace, lambda store: store.claim(self.keys[name], instance=instance, restores=restores))

    @rule(name=names, namespace=namespaces, text=params)
    def replace_initialize(self, name: int, namespace: str, text: str) -> None:
        self.both(
            namespace,
            lambda store: store.replace_initialize(
                self.keys[name],
                initialize_params=text,
                protocol_version="2025-06-18",
                client_name="other",
                client_version="2",
            ),
        )

    @rule(namespace=namespaces, touched=st.dictionaries(names, st.tuples(ages, st.none() | claims)))
    def touch(self, namespace: str, touched: dict[int, tuple[float, tuple[str, int] | None]]) -> None:
        activities = []
        for name, (age, claim) in touched.items():
            claimed_by, restores = (None, 0) if claim is None else claim
            activities.append(
                Activity(key=self.keys[name], first_age=age, last_age=0.0, claimed_by=claimed_by, restores=restores)
            )
        self.both(namespace, lambda store: store.touch(activities))

    @rule(name=names, namespace=namespaces, reason=st.sampled_from(EndReason))
    def end(self, name: int, namespace: str, reason: EndReason) -> None:
        self.both(namespace, lambda store: store.end(self.keys[name], reason=reason))

    @rule(name=names, namespace=namespaces, method=methods, text=st.none() | params)
    def write_journal(self, name: int, namespace: str, method: str, text: str | None) -> None:
        self.both(namespace, lambda store: store.write_journal(self.keys[name], method=method, subject="", params=text))

    @rule(name=names, namespace=namespaces)
    def read_journal(self, name: int, namespace: str) -> None:
        self.both(namespace, lambda store: store.read_journal(self.keys[name]))

    @rule(namespace=namespaces)
    def changes(self, namespace: str) -> None:
        async def changed(store: SessionStore) -> Any:
            return set((await store.changes(self.began[store])).changes)

        self.both(namespace, changed)

    @rule(namespace=namespaces)
    def sweep(self, namespace: str) -> None:
        self.both(namespace, lambda store: store.sweep())

    @rule(name=names, ago=st.sampled_from([1.0, 3600.0]))
    def expire(self, name: int, ago: float) -> None:
        row = rows_of(self.models["one"]).get(self.keys[name])
        if row is not None:
            row.record = replace(row.record, expires_at=datetime.now(UTC) - timedelta(seconds=ago))
        self.runner.run(expire(self.stores["one"], self.keys[name], ago=ago))

    @rule(name=names)
    def lose_the_expiry(self, name: int) -> None:
        row = rows_of(self.models["one"]).get(self.keys[name])
        if row is not None:
            row.record = replace(row.record, expires_at=None)
        table = sessions_table()
        self.runner.run(
            execute(self.stores["one"], sa.update(table).where(table.c.key == self.keys[name]).values(expires_at=None))
        )

    @rule(name=names)
    def age_tombstone(self, name: int) -> None:
        row = rows_of(self.models["one"]).get(self.keys[name])
        if row is not None and row.ended_at is not None:
            row.ended_at = datetime.now(UTC) - timedelta(days=2)
        self.runner.run(age_tombstone(self.stores["one"], self.keys[name]))

    def teardown(self) -> None:
        for name in range(len(self.keys)):
            self.load(name, "one")
            self.load(name, "two")
        for namespace in self.models:
            self.changes(namespace)


# Thousands of calls, which take a minute where nothing else runs, and three on a busy machine.
@pytest.mark.timeout(600)
def test_any_interleaving_of_calls_agrees_with_the_model(migrated_url: str) -> None:
    with asyncio.Runner() as runner:
        stores = {name: SqlSessionStore(migrated_url, namespace=name, timeout=30) for name in ("one", "two")}
        machine = type("Machine", (Interleaving,), {"runner": runner, "stores": stores})
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=80,
                    stateful_step_count=30,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow],
                ),
            )
        finally:
            for store in stores.values():
                runner.run(settled(store))
                runner.run(store.aclose())
