"""Conformance tests of the `SessionStore` and `EventLog` contracts, for anybody who writes one. Needs pytest.

```python
from collections.abc import Iterator
import pytest
from mcp_session_store.testing import MakeStore, SessionStoreConformance

class TestMyStore(SessionStoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        data = MyData()
        return lambda namespace: MyStore(data, namespace=namespace)

    async def expire(self, store, key):
        await store.set_expiry_to_one_second_ago(key)

    async def age_tombstone(self, store, key):
        await store.set_end_to_two_days_ago(key)

class TestMyLog(EventLogConformance):
    @pytest.fixture
    def make_log(self) -> MakeLog:
        data = MyData()

        def make(namespace: str = "default", *, policy: EventPolicy | None = None) -> tuple[SessionStore, EventLog]:
            store = MyStore(data, namespace=namespace)
            return store, MyLog(store, policy=policy)

        return make

    async def expire(self, store, key):
        await store.set_expiry_to_one_second_ago(key)

    async def age_events(self, log, key):
        await log.set_times_to_two_days_ago(key)
```

Write `pytest.register_assert_rewrite("mcp_session_store.testing")` into your `conftest.py`, before the import: a
test that fails then says what it compared. The tests are asynchronous and run under the pytest plugin of anyio,
which this package depends on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from mcp_session_store.errors import EventTooLarge, JournalFull, SessionConflict, SessionLimitReached
from mcp_session_store.event_log import STANDALONE_STREAM, EventLog
from mcp_session_store.records import (
    Activity,
    Change,
    EndReason,
    EventKind,
    JournalEntry,
    NewEvent,
    NewSession,
    Principal,
    SessionRecord,
    StoredEvent,
    message_bytes,
)
from mcp_session_store.retention import (
    NEW_SESSION_LIFETIME,
    EventPolicy,
    EventSweepReport,
    RetentionPolicy,
    SweepReport,
)
from mcp_session_store.store import DEFAULT_NAMESPACE, MAX_JOURNAL_ENTRIES, SessionStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.records import EventPage

__all__ = [
    "EventLogConformance",
    "MakeLog",
    "MakeStore",
    "SessionStoreConformance",
    "new_event",
    "new_session",
]

MakeStore = Callable[[str], SessionStore]
"""Makes a store for a namespace. All that one function makes share their data."""


def new_session(**changes: Any) -> NewSession:
    """A session that can be created, under a key of its own; with other fields where they are given."""
    fields: dict[str, Any] = {
        "key": uuid.uuid4(),
        "initialize_params": '{"protocolVersion": "2025-11-25", "capabilities": {}}',
        "protocol_version": "2025-11-25",
        "client_name": "client",
        "client_version": "1.0",
        "principal": Principal.of(client_id="client-id", issuer="https://issuer", subject="somebody"),
        "instance": "instance-a",
    }
    return NewSession(**(fields | changes))


def new_event(position: int = 0, **changes: Any) -> NewEvent:
    """An event that can be stored; with other fields where they are given."""
    fields: dict[str, Any] = {
        "stream": "instance.1",
        "position": position,
        "previous": position - 1,
        "kind": EventKind.NOTIFICATION,
        "message": json.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": position}}),
    }
    return NewEvent(**(fields | changes))


_UNLIMITED = RetentionPolicy(idle=None, absolute=None)
_SHORT = RetentionPolicy(idle=timedelta(milliseconds=40))
"""With a grace so short that a sweep takes at once what `expire` made."""

POLICIES = [
    RetentionPolicy(idle=timedelta(hours=1)),
    RetentionPolicy(idle=timedelta(hours=2), absolute=timedelta(hours=1)),
    RetentionPolicy(idle=timedelta(hours=1), absolute=timedelta(hours=2)),
    RetentionPolicy(idle=None, absolute=timedelta(hours=1)),
    _UNLIMITED,
]


def _with_policy(make_store: MakeStore, policy: RetentionPolicy, *, namespace: str = "default") -> SessionStore:
    store = make_store(namespace)
    store.retention = policy
    return store


def _assert_expires_by(policy: RetentionPolicy, record: SessionRecord) -> None:
    expected = policy.expiry(created_at=record.created_at, last_seen_at=record.last_seen_at)
    if expected is None or record.expires_at is None:
        assert record.expires_at == expected
    else:
        assert abs(record.expires_at - expected) < timedelta(seconds=1)


async def _swept(store: SessionStore, *, limit: int = 500) -> SweepReport:
    """Sweep for as long as there is more."""
    report = SweepReport(more=True)
    for _ in range(100):
        if not report.more:
            return report
        report += await store.sweep(limit=limit)
    raise AssertionError("a sweep has no end")


def _ordered(changes: Sequence[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: change.key)


@pytest.mark.anyio
class SessionStoreConformance:
    """What every `SessionStore` does. Subclass it, and give the fixture `make_store` and the two methods."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The event loop: asyncio. Override it for a store that needs another."""
        return "asyncio"

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """A function that makes stores over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_store")

    @pytest.fixture
    def store(self, make_store: MakeStore) -> SessionStore:
        return make_store("default")

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Make a session of the store have expired one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        """Make a session of the store that has ended have done so two days ago."""
        raise NotImplementedError("override the method age_tombstone")

    async def _ended_two_days_ago(self, store: SessionStore, **changes: Any) -> NewSession:
        session = new_session(**changes)
        await store.create(session)
        assert await store.end(session.key, reason=EndReason.CLIENT)
        await self.age_tombstone(store, session.key)
        return session

    # Create and load

    async def test_a_created_session_is_loaded_as_it_was_created(self, store: SessionStore) -> None:
        session = new_session()
        created = await store.create(session)
        assert created.key == session.key
        assert created.namespace == store.namespace
        assert created.initialize_params == session.initialize_params
        assert created.protocol_version == session.protocol_version
        assert created.client_name == session.client_name
        assert created.client_version == session.client_version
        assert created.principal == session.principal
        assert created.instance_hint == session.instance
        assert (created.restores, created.revision) == (0, 0)
        assert await store.load(session.key) == created

    async def test_the_principals_text_is_kept_to_be_shown(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        record = await store.load(session.key)
        assert record is not None
        assert record.principal is not None
        assert session.principal is not None
        assert record.principal.display == session.principal.display

    async def test_a_session_without_a_principal_stays_without_one(self, store: SessionStore) -> None:
        session = new_session(principal=None)
        created = await store.create(session)
        assert created.principal is None
        assert await store.load(session.key) == created

    async def test_a_new_session_lives_for_the_lifetime_of_new_ones(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        assert created.created_at.utcoffset() == timedelta(0)
        assert created.expires_at is not None
        slack = timedelta(seconds=1)
        assert abs(created.expires_at - created.created_at - NEW_SESSION_LIFETIME) < slack
        assert abs(created.last_seen_at - created.created_at) < slack

    async def test_a_new_session_lives_no_longer_than_the_policy_allows(self, make_store: MakeStore) -> None:
        for policy in (RetentionPolicy(idle=timedelta(minutes=2)), RetentionPolicy(absolute=timedelta(minutes=2))):
            created = await _with_policy(make_store, policy).create(new_session())
            assert created.expires_at is not None
            assert abs(created.expires_at - created.created_at - timedelta(minutes=2)) < timedelta(seconds=1)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(json.dumps({"name": "\0"}), id="escaped NUL"),
            pytest.param(json.dumps({"name": "\ud800"}), id="escaped surrogate"),
            pytest.param(json.dumps({"name": "名前 🦀 é"}, ensure_ascii=False), id="not ASCII"),
            pytest.param('{"b": 1,  "a": 2, "a": 3, "n": 1.0e2, "x": [null, "\'\\"$1?:a%s"]}', id="as written"),
            pytest.param(json.dumps({"name": "x" * 65_536}), id="64 KiB"),
        ],
    )
    async def test_initialize_params_come_back_to_the_letter(self, store: SessionStore, text: str) -> None:
        session = new_session(initialize_params=text)
        await store.create(session)
        record = await store.load(session.key)
        assert record is not None
        assert record.initialize_params == text

    async def test_an_unknown_session_is_not_found(self, store: SessionStore) -> None:
        await store.create(new_session())
        assert await store.load(uuid.uuid4()) is None

    async def test_to_create_the_same_session_again_changes_nothing(self, store: SessionStore) -> None:
        session = new_session()
        created = await store.create(session)
        assert await store.create(session) == created
        assert await store.load(session.key) == created

    @pytest.mark.parametrize(
        "change",
        [
            {"initialize_params": '{"protocolVersion": "2025-11-25"}'},
            {"protocol_version": "2025-06-18"},
            {"principal": None},
            {"principal": Principal.of(client_id="client-id", issuer="https://issuer", subject="somebody else")},
            {"instance": "instance-b"},
        ],
        ids=lambda change: ",".join(change),
    )
    async def test_another_session_under_the_same_key_is_a_conflict(
        self, store: SessionStore, change: dict[str, Any]
    ) -> None:
        session = new_session()
        created = await store.create(session)
        with pytest.raises(SessionConflict):
            await store.create(new_session(key=session.key, **change))
        assert await store.load(session.key) == created

    async def test_an_ended_session_cannot_be_created_again(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await store.end(session.key, reason=EndReason.CLIENT)
        with pytest.raises(SessionConflict):
            await store.create(session)
        assert await store.load(session.key) is None

    async def test_an_expired_session_cannot_be_created_again(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        with pytest.raises(SessionConflict):
            await store.create(session)
        assert await store.load(session.key) is None

    async def test_one_session_created_many_times_at_once_is_one(self, store: SessionStore) -> None:
        session = new_session()
        records = await asyncio.gather(*(store.create(session) for _ in range(20)))
        assert set(records) == {await store.load(session.key)}

    async def test_of_different_sessions_created_at_once_under_one_key_one_stands(self, store: SessionStore) -> None:
        key = uuid.uuid4()
        sessions = [new_session(key=key, instance=f"instance-{number}") for number in range(10)]
        outcomes = await asyncio.gather(*map(store.create, sessions), return_exceptions=True)
        records = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(records) == 1
        assert await store.load(key) == records[0]
        assert sum(isinstance(outcome, SessionConflict) for outcome in outcomes) == 9

    async def test_many_sessions_are_created_and_loaded_at_once(self, store: SessionStore) -> None:
        sessions = [new_session(client_name=f"client {number}") for number in range(1100)]
        created = await asyncio.gather(*map(store.create, sessions))
        unknown = [uuid.uuid4() for _ in range(100)]
        loaded = await asyncio.gather(*(store.load(key) for key in [*unknown, *(s.key for s in sessions)]))
        assert loaded == [*[None] * 100, *created]
        assert [record.client_name for record in created] == [session.client_name for session in sessions]

    # Expiry and end

    async def test_an_expired_session_is_not_found(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        assert await store.load(session.key) is None

    async def test_an_ended_session_is_not_found(self, store: SessionStore) -> None:
        session, other = new_session(), new_session()
        await store.create(session)
        created = await store.create(other)
        assert await store.end(session.key, reason=EndReason.CLIENT) is True
        assert await store.load(session.key) is None
        assert await store.load(other.key) == created

    async def test_a_session_ends_once(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        assert await store.end(session.key, reason=EndReason.CLIENT) is True
        assert await store.end(session.key, reason=EndReason.OPERATOR) is False

    async def test_of_many_who_end_a_session_at_once_one_ended_it(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        outcomes = await asyncio.gather(*(store.end(session.key, reason=EndReason.CLIENT) for _ in range(20)))
        assert sum(outcomes) == 1

    async def test_an_unknown_or_expired_session_cannot_be_ended(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        assert await store.end(session.key, reason=EndReason.CLIENT) is False
        assert await store.end(uuid.uuid4(), reason=EndReason.CLIENT) is False

    # Claim

    async def test_a_claim_counts_the_restore_and_names_the_instance(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        claimed = await store.claim(created.key, instance="instance-b", restores=0)
        assert claimed is not None
        assert (claimed.instance_hint, claimed.restores, claimed.revision) == ("instance-b", 1, 0)
        assert claimed.last_seen_at >= created.last_seen_at
        assert claimed.created_at == created.created_at
        assert await store.load(created.key) == claimed

    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    async def test_a_claimed_session_expires_as_the_policy_says(
        self, make_store: MakeStore, policy: RetentionPolicy
    ) -> None:
        store = _with_policy(make_store, policy)
        created = await store.create(new_session())
        claimed = await store.claim(created.key, instance="instance-b", restores=0)
        assert claimed is not None
        _assert_expires_by(policy, claimed)

    async def test_a_claim_that_is_repeated_counts_once(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for _ in range(3):
            claimed = await store.claim(created.key, instance="instance-b", restores=0)
            assert claimed is not None
            assert claimed.restores == 1

    async def test_a_later_restore_on_the_same_instance_counts(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for restores in range(3):
            claimed = await store.claim(created.key, instance="instance-a", restores=restores)
            assert claimed is not None
            assert claimed.restores == restores + 1

    async def test_each_of_several_instances_that_claim_at_once_counts(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(2)]
        created = await stores[0].create(new_session())
        claims = [
            stores[number % 2].claim(created.key, instance=f"instance {number}", restores=0) for number in range(10)
        ]
        claimed = await asyncio.gather(*claims)
        assert sorted(record.restores for record in claimed if record is not None) == list(range(1, 11))
        last = await stores[0].load(created.key)
        assert last is not None
        assert last in claimed
        assert last.restores == 10

    async def test_an_unknown_ended_or_expired_session_cannot_be_claimed(self, store: SessionStore) -> None:
        ended, expired = await store.create(new_session()), await store.create(new_session())
        await store.end(ended.key, reason=EndReason.CLIENT)
        await self.expire(store, expired.key)
        for key in (ended.key, expired.key, uuid.uuid4()):
            assert await store.claim(key, instance="instance-b", restores=0) is None
            assert await store.load(key) is None

    # A second initialize

    async def test_what_a_restore_replays_can_be_replaced(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for revision in (1, 2):
            assert await store.replace_initialize(
                created.key,
                initialize_params=json.dumps({"revision": revision}),
                protocol_version="2025-06-18",
                client_name="other",
                client_version="2.0",
            )
            record = await store.load(created.key)
            assert record is not None
            assert json.loads(record.initialize_params) == {"revision": revision}
            assert (record.protocol_version, record.client_name, record.client_version) == (
                "2025-06-18",
                "other",
                "2.0",
            )
            assert record.revision == revision
            assert (record.principal, record.instance_hint) == (created.principal, created.instance_hint)
            assert record.expires_at == created.expires_at

    async def test_of_a_session_that_is_not_live_nothing_is_replaced(self, store: SessionStore) -> None:
        ended, expired = await store.create(new_session()), await store.create(new_session())
        await store.end(ended.key, reason=EndReason.CLIENT)
        await self.expire(store, expired.key)
        for key in (ended.key, expired.key, uuid.uuid4()):
            assert not await store.replace_initialize(
                key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
            )

    # Touch

    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    async def test_after_activity_a_session_expires_as_the_policy_says(
        self, make_store: MakeStore, policy: RetentionPolicy
    ) -> None:
        store = _with_policy(make_store, policy)
        created = await store.create(new_session())
        assert await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)]) == set()
        record = await store.load(created.key)
        assert record is not None
        _assert_expires_by(policy, record)
        assert record.last_seen_at >= created.last_seen_at
        assert record.created_at == created.created_at

    async def test_a_report_that_comes_later_than_the_idle_time_extends_nothing_to_now(
        self, make_store: MakeStore
    ) -> None:
        store = _with_policy(make_store, RetentionPolicy(idle=timedelta(milliseconds=40)))
        unlimited = _with_policy(make_store, _UNLIMITED)
        created = await unlimited.create(new_session())
        await asyncio.sleep(0.05)
        assert await store.touch([Activity(key=created.key, first_age=0.05, last_age=0.05)]) == {created.key}
        assert await store.load(created.key) is None

    async def test_no_activity_extends_a_session_beyond_its_absolute_lifetime(self, make_store: MakeStore) -> None:
        unlimited = _with_policy(make_store, _UNLIMITED)
        store = _with_policy(make_store, RetentionPolicy(idle=None, absolute=timedelta(milliseconds=20)))
        created = await unlimited.create(new_session())
        await asyncio.sleep(0.03)
        assert await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)]) == {created.key}
        assert await store.load(created.key) is None

    async def test_activity_before_the_expiry_counts_when_it_is_reported_after(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await self.expire(store, created.key)
        assert await store.touch([Activity(key=created.key, first_age=60.0, last_age=0.0)]) == set()
        assert await store.load(created.key) is not None

    async def test_activity_after_the_expiry_revives_nothing(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await self.expire(store, created.key)
        assert await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)]) == {created.key}
        assert await store.load(created.key) is None

    async def test_last_seen_never_goes_back(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await store.touch([Activity(key=created.key, first_age=7200.0, last_age=3600.0)])
        record = await store.load(created.key)
        assert record is not None
        assert record.last_seen_at == created.last_seen_at

    async def test_activity_is_dated_by_its_age(self, store: SessionStore) -> None:
        older, newer = await store.create(new_session()), await store.create(new_session())
        await asyncio.sleep(0.1)  # last_seen_at never goes back, so there must be some past to point to
        await store.touch(
            [
                Activity(key=older.key, first_age=0.05, last_age=0.05),
                Activity(key=newer.key, first_age=0.05, last_age=0.0),
            ]
        )
        seen_older, seen_newer = await store.load(older.key), await store.load(newer.key)
        assert seen_older is not None
        assert seen_newer is not None
        assert seen_older.last_seen_at > older.last_seen_at
        assert seen_newer.last_seen_at - seen_older.last_seen_at > timedelta(milliseconds=40)

    async def test_a_touch_tells_which_sessions_are_not_live(self, store: SessionStore) -> None:
        live, ended, expired = [await store.create(new_session()) for _ in range(3)]
        await store.end(ended.key, reason=EndReason.OPERATOR)
        await self.expire(store, expired.key)
        unknown = uuid.uuid4()
        keys = [live.key, ended.key, expired.key, unknown]
        touched = await store.touch([Activity(key=key, first_age=0.0, last_age=0.0) for key in keys])
        assert touched == {ended.key, expired.key, unknown}

    async def test_a_touch_takes_any_number_of_sessions(self, store: SessionStore) -> None:
        assert await store.touch([]) == set()
        live = [record.key for record in await asyncio.gather(*(store.create(new_session()) for _ in range(30)))]
        unknown = [uuid.uuid4() for _ in range(1200)]
        activities = [Activity(key=key, first_age=0.0, last_age=0.0) for key in [*unknown, *live]]
        assert await store.touch(activities) == set(unknown)
        for key in live:
            record = await store.load(key)
            assert record is not None
            _assert_expires_by(store.retention, record)

    # Sweep

    async def test_a_sweep_ends_what_has_expired_and_nothing_else(self, make_store: MakeStore) -> None:
        store = make_store("default")
        live, expired = await store.create(new_session()), await store.create(new_session())
        await self.expire(store, expired.key)
        store.retention = _SHORT
        assert await _swept(store) == SweepReport(expired=1)
        assert await _swept(store) == SweepReport()
        assert await store.load(live.key) == live
        assert await store.load(expired.key) is None

    async def test_what_a_sweep_ended_never_lives_again(self, make_store: MakeStore) -> None:
        store = make_store("default")
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        store.retention = _SHORT
        await _swept(store)
        # Activity from before the expiry would have extended it until the sweep.
        assert await store.touch([Activity(key=session.key, first_age=60.0, last_age=0.0)]) == {session.key}
        assert await store.claim(session.key, instance="instance-b", restores=0) is None
        with pytest.raises(SessionConflict):
            await store.create(session)
        assert await store.load(session.key) is None

    async def test_a_sweep_leaves_alone_what_expired_a_moment_ago(self, make_store: MakeStore) -> None:
        store = _with_policy(make_store, RetentionPolicy(idle=timedelta(hours=1)))
        created = await store.create(new_session())
        await self.expire(store, created.key)
        assert await _swept(store) == SweepReport()
        assert await store.touch([Activity(key=created.key, first_age=60.0, last_age=0.0)]) == set()
        assert await store.load(created.key) is not None

    async def test_a_sweep_removes_old_tombstones_for_good(self, make_store: MakeStore) -> None:
        store = make_store("default")
        old = await self._ended_two_days_ago(store)
        recent = new_session()
        await store.create(recent)
        await store.end(recent.key, reason=EndReason.CLIENT)
        assert await _swept(store) == SweepReport(purged=1)
        with pytest.raises(SessionConflict):
            await store.create(recent)
        assert (await store.create(old)).key == old.key

    async def test_tombstones_are_kept_for_ever_when_the_policy_says_so(self, make_store: MakeStore) -> None:
        store = _with_policy(make_store, RetentionPolicy(tombstone=None))
        old = await self._ended_two_days_ago(store)
        assert await _swept(store) == SweepReport()
        with pytest.raises(SessionConflict):
            await store.create(old)

    async def test_even_without_tombstones_an_end_is_kept_until_all_have_learned_of_it(
        self, make_store: MakeStore
    ) -> None:
        store = _with_policy(make_store, RetentionPolicy(tombstone=timedelta(0)))
        created = await store.create(new_session())
        since = (await store.changes(None)).until
        await store.end(created.key, reason=EndReason.CLIENT)
        assert await _swept(store) == SweepReport()
        assert [change.key for change in (await store.changes(since)).changes] == [created.key]

    async def test_a_sweep_gives_sessions_without_an_expiry_the_one_that_they_would_have(
        self, make_store: MakeStore
    ) -> None:
        unlimited = _with_policy(make_store, _UNLIMITED)
        created = [await unlimited.create(new_session()) for _ in range(3)]
        await unlimited.touch([Activity(key=record.key, first_age=0.0, last_age=0.0) for record in created])
        before = [await unlimited.load(record.key) for record in created]
        assert [record and record.expires_at for record in before] == [None] * 3
        policy = RetentionPolicy(idle=timedelta(hours=2), absolute=timedelta(hours=1))
        store = _with_policy(make_store, policy)
        assert await _swept(store, limit=2) == SweepReport()
        for record in created:
            loaded = await store.load(record.key)
            assert loaded is not None
            _assert_expires_by(policy, loaded)

    async def test_a_step_of_a_sweep_takes_no_more_than_its_limit(self, make_store: MakeStore) -> None:
        store = make_store("default")
        for _ in range(5):
            await self.expire(store, (await store.create(new_session())).key)
            await self._ended_two_days_ago(store)
        store.retention = _SHORT
        assert await store.sweep(limit=3) == SweepReport(expired=3, purged=3, more=True)
        assert await store.sweep(limit=3) == SweepReport(expired=2, purged=2)

    async def test_several_who_sweep_at_once_handle_each_session_once(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(3)]
        for _ in range(20):
            await self.expire(stores[0], (await stores[0].create(new_session())).key)
            await self._ended_two_days_ago(stores[0])
        reports: list[SweepReport] = []
        for store in stores:
            store.retention = _SHORT
        for _ in range(100):
            round_of_all = await asyncio.gather(*(store.sweep(limit=4) for store in stores))
            reports += round_of_all
            if round_of_all == [SweepReport()] * 3:
                break
        assert sum(report.expired for report in reports) == 20
        assert sum(report.purged for report in reports) == 20

    # Changes

    async def test_changes_begin_with_the_moment_to_go_on_from(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await store.end(created.key, reason=EndReason.CLIENT)
        assert (await store.changes(None)).changes == []

    @pytest.mark.parametrize("reason", EndReason)
    async def test_the_end_of_a_session_is_a_change(self, make_store: MakeStore, reason: EndReason) -> None:
        here, there = make_store("default"), make_store("default")
        created = await there.create(new_session())
        since = (await here.changes(None)).until
        await there.end(created.key, reason=reason)
        changes = await here.changes(since)
        assert changes.changes == [Change(key=created.key, revision=0, ended=reason)]
        assert changes.until >= since

    async def test_a_new_revision_is_a_change(self, store: SessionStore) -> None:
        replaced, journaled = await store.create(new_session()), await store.create(new_session())
        since = (await store.changes(None)).until
        await store.replace_initialize(
            replaced.key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
        )
        for _ in range(2):
            await store.write_journal(journaled.key, method="m", subject="", params="{}")
        assert _ordered((await store.changes(since)).changes) == _ordered(
            [Change(key=replaced.key, revision=1, ended=None), Change(key=journaled.key, revision=2, ended=None)]
        )

    async def test_what_copies_need_not_learn_is_no_change(self, make_store: MakeStore) -> None:
        store = make_store("default")
        since = (await store.changes(None)).until
        used, expired = await store.create(new_session()), await store.create(new_session())
        await store.claim(used.key, instance="instance-b", restores=0)
        await store.touch([Activity(key=used.key, first_age=0.0, last_age=0.0)])
        await self.expire(store, expired.key)
        await store.end(expired.key, reason=EndReason.CLIENT)
        store.retention = _SHORT
        assert (await _swept(store)).expired == 1
        assert (await store.changes(since)).changes == []

    async def test_no_change_is_missing_however_often_it_is_asked(self, make_store: MakeStore) -> None:
        here, there = make_store("default"), make_store("default")
        sessions = [await there.create(new_session()) for _ in range(40)]
        told: set[UUID] = set()
        since = (await here.changes(None)).until

        async def end_all() -> None:
            for session in sessions:
                await there.end(session.key, reason=EndReason.CLIENT)

        ending = asyncio.ensure_future(end_all())
        done = False
        while not done:
            done = ending.done()
            await asyncio.sleep(0)
            changes = await here.changes(since)
            since = changes.until
            told |= {change.key for change in changes.changes}
        await ending
        assert told == {session.key for session in sessions}

    # Hints

    async def test_who_waits_for_hints_may_be_cancelled(self, store: SessionStore) -> None:
        hints: list[object] = []
        created = await store.create(new_session())
        for _ in range(3):
            listening = asyncio.ensure_future(store.listen(hints.append))
            await asyncio.sleep(0.01)
            assert not listening.done()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            assert listening.cancelled()
        assert await store.end(created.key, reason=EndReason.CLIENT)

    # The journal

    async def test_a_new_session_has_no_journal(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        assert await store.read_journal(created.key) == []
        assert await store.read_journal(uuid.uuid4()) == []

    async def test_the_journal_is_read_in_the_order_in_which_it_was_last_set(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        other = (await store.create(new_session())).key
        writes = [("level", "", "1"), ("subscribe", "a", "2"), ("subscribe", "b", "3"), ("level", "", "4")]
        for revision, (method, subject, params) in enumerate(writes, start=1):
            assert await store.write_journal(key, method=method, subject=subject, params=params) == revision
        await store.write_journal(other, method="level", subject="", params="5")
        assert await store.read_journal(key) == [
            JournalEntry(method="subscribe", subject="a", params="2"),
            JournalEntry(method="subscribe", subject="b", params="3"),
            JournalEntry(method="level", subject="", params="4"),
        ]
        record = await store.load(key)
        assert record is not None
        assert record.revision == 4

    async def test_an_entry_is_removed_from_the_journal(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await store.write_journal(key, method="subscribe", subject="a", params="{}")
        await store.write_journal(key, method="subscribe", subject="b", params="{}")
        assert await store.write_journal(key, method="subscribe", subject="a", params=None) == 3
        assert await store.write_journal(key, method="subscribe", subject="never there", params=None) == 4
        assert await store.read_journal(key) == [JournalEntry(method="subscribe", subject="b", params="{}")]

    async def test_journaled_params_come_back_to_the_letter(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        params = json.dumps({"uri": "file:///名前 🦀", "x": "\0"}, ensure_ascii=False) + " "
        await store.write_journal(key, method="m", subject="file:///名前 🦀", params=params)
        assert await store.read_journal(key) == [JournalEntry(method="m", subject="file:///名前 🦀", params=params)]

    async def test_a_session_that_is_not_live_has_no_journal(self, store: SessionStore) -> None:
        ended, expired = await store.create(new_session()), await store.create(new_session())
        for key in (ended.key, expired.key):
            await store.write_journal(key, method="m", subject="", params="{}")
        await store.end(ended.key, reason=EndReason.CLIENT)
        await self.expire(store, expired.key)
        for key in (ended.key, expired.key, uuid.uuid4()):
            assert await store.read_journal(key) == []
            assert await store.write_journal(key, method="m", subject="", params="{}") is None

    async def test_a_journal_goes_with_its_session(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await store.write_journal(session.key, method="m", subject="", params="{}")
        await store.end(session.key, reason=EndReason.CLIENT)
        await self.age_tombstone(store, session.key)
        assert (await _swept(store)).purged == 1
        await store.create(session)
        assert await store.read_journal(session.key) == []

    async def test_several_who_write_a_journal_at_once_each_raise_the_revision(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(2)]
        key = (await stores[0].create(new_session())).key
        revisions = await asyncio.gather(
            *(
                stores[number % 2].write_journal(key, method="m", subject=str(number % 4), params=str(number))
                for number in range(20)
            )
        )
        assert sorted(revision or 0 for revision in revisions) == list(range(1, 21))
        # The last that was written for each subject, in the order in which they were.
        order = sorted(range(20), key=lambda number: revisions[number] or 0)
        last = {number % 4: number for number in order}
        expected = [str(number) for number in order if last[number % 4] == number]
        assert [entry.params for entry in await stores[0].read_journal(key)] == expected

    async def test_a_full_journal_takes_no_more_and_what_is_there_can_be_changed(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key

        def write(subject: str, params: str | None = "{}") -> Any:
            return store.write_journal(key, method="m", subject=subject, params=params)

        # Not all at once: each call has its time, and waits for those before it.
        for start in range(0, MAX_JOURNAL_ENTRIES, 100):
            await asyncio.gather(*(write(str(number)) for number in range(start, start + 100)))
        with pytest.raises(JournalFull):
            await write("one more")
        record = await store.load(key)
        assert record is not None
        assert record.revision == MAX_JOURNAL_ENTRIES
        assert await write("7", "[]") == MAX_JOURNAL_ENTRIES + 1
        assert (await store.read_journal(key))[-1] == JournalEntry(method="m", subject="7", params="[]")
        await write("8", None)
        await write("one more")
        assert len(await store.read_journal(key)) == MAX_JOURNAL_ENTRIES

    # How many there may be

    async def _open_in_order(self, store: SessionStore, count: int, **changes: Any) -> list[UUID]:
        keys = []
        for _ in range(count):
            keys.append((await store.create(new_session(**changes))).key)
            await asyncio.sleep(0.002)  # a clock may show whole milliseconds
        return keys

    async def _live_among(self, store: SessionStore, keys: Sequence[UUID]) -> list[UUID]:
        return [key for key in keys if await store.load(key) is not None]

    async def test_a_principals_session_too_many_ends_the_one_that_was_not_seen_for_longest(
        self, make_store: MakeStore
    ) -> None:
        store = _with_policy(make_store, RetentionPolicy(per_principal=3))
        others = await self._open_in_order(store, 3, principal=Principal.of(client_id="another"))
        nobodys = await self._open_in_order(store, 4, principal=None)
        keys = await self._open_in_order(store, 3)
        await store.touch([Activity(key=keys[0], first_age=0.0, last_age=0.0)])
        since = (await store.changes(None)).until
        (newest,) = await self._open_in_order(store, 1)
        assert await self._live_among(store, [*keys, newest]) == [keys[0], keys[2], newest]
        assert (await store.changes(since)).changes == [Change(key=keys[1], revision=0, ended=EndReason.LIMIT)]
        assert await self._live_among(store, [*others, *nobodys]) == [*others, *nobodys]

    async def test_a_limit_that_was_lowered_is_kept_from_the_next_session_on(self, make_store: MakeStore) -> None:
        keys = await self._open_in_order(make_store("default"), 5)
        store = _with_policy(make_store, RetentionPolicy(per_principal=2))
        (newest,) = await self._open_in_order(store, 1)
        assert await self._live_among(store, [*keys, newest]) == [keys[4], newest]

    async def test_a_principals_session_too_many_is_refused_when_the_policy_says_so(
        self, make_store: MakeStore
    ) -> None:
        store = _with_policy(make_store, RetentionPolicy(per_principal=2, per_principal_excess="refuse"))
        keys = await self._open_in_order(store, 2)
        refused = new_session()
        with pytest.raises(SessionLimitReached):
            await store.create(refused)
        assert await self._live_among(store, [*keys, refused.key]) == keys
        await store.create(new_session(principal=Principal.of(client_id="another")))
        await store.create(new_session(principal=None))
        await store.end(keys[0], reason=EndReason.CLIENT)
        await store.create(refused)
        assert await self._live_among(store, [*keys, refused.key]) == [keys[1], refused.key]

    @pytest.mark.parametrize("excess", ["end_oldest", "refuse"])
    async def test_ended_and_expired_sessions_do_not_count_for_a_principal(
        self, make_store: MakeStore, excess: Any
    ) -> None:
        store = _with_policy(make_store, RetentionPolicy(per_principal=2, per_principal_excess=excess))
        ended, expired = await self._open_in_order(store, 2)
        await store.end(ended, reason=EndReason.CLIENT)
        await self.expire(store, expired)
        keys = await self._open_in_order(store, 2)
        assert await self._live_among(store, keys) == keys

    @pytest.mark.parametrize("excess", ["end_oldest", "refuse"])
    async def test_to_create_the_same_session_again_ends_nobody(self, make_store: MakeStore, excess: Any) -> None:
        store = _with_policy(make_store, RetentionPolicy(per_principal=2, per_principal_excess=excess))
        sessions = [new_session(), new_session()]
        for session in sessions:
            await store.create(session)
        for _ in range(3):
            await asyncio.gather(*map(store.create, sessions))
        keys = [session.key for session in sessions]
        assert await self._live_among(store, keys) == keys

    async def test_of_many_sessions_that_a_principal_opens_at_once_as_many_live_as_may(
        self, make_store: MakeStore
    ) -> None:
        stores = [_with_policy(make_store, RetentionPolicy(per_principal=3)) for _ in range(2)]
        sessions = [new_session(principal=Principal.of(client_id=str(number % 2))) for number in range(20)]
        records = await asyncio.gather(
            *(stores[number // 2 % 2].create(session) for number, session in enumerate(sessions))
        )
        assert [record.key for record in records] == [session.key for session in sessions]
        for client in range(2):
            live = await self._live_among(stores[0], [session.key for session in sessions[client::2]])
            assert len(live) == 3

    async def test_of_many_sessions_that_are_opened_at_once_those_too_many_are_refused(
        self, make_store: MakeStore
    ) -> None:
        policy = RetentionPolicy(per_principal=3, per_principal_excess="refuse", anonymous=4)
        stores = [_with_policy(make_store, policy) for _ in range(2)]
        sessions = [new_session(principal=Principal.of(client_id="a") if number % 2 else None) for number in range(20)]
        outcomes = await asyncio.gather(
            *(stores[number // 2 % 2].create(session) for number, session in enumerate(sessions)),
            return_exceptions=True,
        )
        refused = [isinstance(outcome, SessionLimitReached) for outcome in outcomes]
        assert (refused[0::2].count(False), refused[1::2].count(False)) == (4, 3)
        live = await self._live_among(stores[0], [session.key for session in sessions])
        assert live == [outcome.key for outcome in outcomes if isinstance(outcome, SessionRecord)]

    async def test_sessions_without_a_principal_are_limited_with_their_tombstones(self, make_store: MakeStore) -> None:
        store = _with_policy(make_store, RetentionPolicy(anonymous=3))
        keys = await self._open_in_order(store, 3, principal=None)
        await store.end(keys[0], reason=EndReason.CLIENT)
        await self.expire(store, keys[1])
        session = new_session(principal=None)
        with pytest.raises(SessionLimitReached):
            await store.create(session)
        assert await self._live_among(store, [*keys, session.key]) == [keys[2]]
        await store.create(new_session())
        assert await store.load(keys[2]) == await store.create(new_session(key=keys[2], principal=None))

    async def test_old_tombstones_make_room_for_sessions_without_a_principal(self, make_store: MakeStore) -> None:
        store = _with_policy(make_store, RetentionPolicy(anonymous=3, tombstone=None))
        theirs = await self._ended_two_days_ago(store)
        for _ in range(2):
            await self._ended_two_days_ago(store, principal=None)
        keys = await self._open_in_order(store, 3, principal=None)
        refused = new_session(principal=None)
        with pytest.raises(SessionLimitReached):
            await store.create(refused)
        assert await self._live_among(store, [*keys, refused.key]) == keys
        with pytest.raises(SessionConflict):
            await store.create(theirs)

    async def test_a_limit_of_no_sessions_without_a_principal_lets_none_in(self, make_store: MakeStore) -> None:
        store = _with_policy(make_store, RetentionPolicy(anonymous=0))
        with pytest.raises(SessionLimitReached):
            await store.create(new_session(principal=None))
        await store.create(new_session())

    # Namespaces

    async def test_a_session_of_another_namespace_does_not_exist(self, make_store: MakeStore) -> None:
        mine, theirs = make_store("mine"), make_store("theirs")
        created = await theirs.create(new_session())
        assert (mine.namespace, theirs.namespace) == ("mine", "theirs")
        assert await mine.load(created.key) is None
        assert await mine.claim(created.key, instance="instance-b", restores=0) is None
        assert await mine.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)]) == {created.key}
        assert await mine.end(created.key, reason=EndReason.CLIENT) is False
        assert not await mine.replace_initialize(
            created.key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
        )
        assert await mine.write_journal(created.key, method="m", subject="", params="{}") is None
        assert await theirs.load(created.key) == created

    async def test_what_belongs_to_another_namespace_is_not_told_read_or_swept(self, make_store: MakeStore) -> None:
        mine, theirs = make_store("mine"), make_store("theirs")
        ended, expired, journaled = [await theirs.create(new_session()) for _ in range(3)]
        since = (await mine.changes(None)).until
        await theirs.end(ended.key, reason=EndReason.CLIENT)
        await self.age_tombstone(theirs, ended.key)
        await self.expire(theirs, expired.key)
        await theirs.write_journal(journaled.key, method="m", subject="", params="{}")
        mine.retention = _SHORT
        assert await _swept(mine) == SweepReport()
        assert await mine.read_journal(journaled.key) == []
        assert (await mine.changes(since)).changes == []
        theirs.retention = _SHORT
        assert await _swept(theirs) == SweepReport(expired=1, purged=1)

    async def test_a_key_that_another_namespace_has_taken_is_a_conflict(self, make_store: MakeStore) -> None:
        session = new_session()
        created = await make_store("theirs").create(session)
        with pytest.raises(SessionConflict):
            await make_store("mine").create(session)
        assert await make_store("theirs").load(session.key) == created

    async def test_stores_of_one_namespace_see_the_same_sessions(self, make_store: MakeStore) -> None:
        here, there = make_store("default"), make_store("default")
        created = await here.create(new_session())
        assert await there.load(created.key) == created
        await there.end(created.key, reason=EndReason.CLIENT)
        assert await here.load(created.key) is None

    # Calls that are cancelled, and the store's own life

    async def test_a_call_that_is_cancelled_disturbs_no_other(self, store: SessionStore) -> None:
        sessions = [new_session() for _ in range(30)]
        tasks = [asyncio.ensure_future(store.create(session)) for session in sessions]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [outcome for number, outcome in enumerate(outcomes) if number % 3]
        assert kept == [await store.load(session.key) for number, session in enumerate(sessions) if number % 3]
        assert None not in kept

    async def test_a_store_may_be_opened_and_closed_more_than_once(self, make_store: MakeStore) -> None:
        store = make_store("default")
        await store.open()
        await store.open()
        await store.aclose()
        await store.aclose()


class MakeLog(Protocol):
    """Makes a log, and the store of its sessions, for a namespace. All that one function makes share their data."""

    def __call__(
        self, namespace: str = DEFAULT_NAMESPACE, *, policy: EventPolicy | None = None
    ) -> tuple[SessionStore, EventLog]: ...


def _stored(event: NewEvent, sequence: int) -> StoredEvent:
    return StoredEvent(
        sequence=sequence, position=event.position, previous=event.previous, kind=event.kind, message=event.message
    )


async def _page(log: EventLog, key: UUID, stream: str = "instance.1", *, after: int = 0, limit: int = 100) -> EventPage:
    page = await log.read(key, stream, after=after, limit=limit)
    assert page is not None
    assert len(page.events) <= limit
    return page


async def _all_of(log: EventLog, key: UUID, stream: str = "instance.1", *, limit: int = 100) -> list[StoredEvent]:
    """A stream from its beginning, page by page."""
    events: list[StoredEvent] = []
    after, more = 0, True
    while more:
        page = await _page(log, key, stream, after=after, limit=limit)
        assert page.events or not page.more
        events += page.events
        after, more = (page.events[-1].sequence, page.more) if page.events else (page.last, False)
    return events


async def _events_swept(log: EventLog, *, limit: int = 500) -> int:
    """Sweep for as long as there is more; how many events were removed."""
    report = EventSweepReport(more=True)
    for _ in range(200):
        if not report.more:
            return report.removed
        report += await log.sweep(limit=limit)
    raise AssertionError("a sweep has no end")


def _sized(size: int, position: int, **changes: Any) -> NewEvent:
    """An event whose message takes so many bytes."""
    return new_event(position, message='"' + "x" * (size - 2) + '"', **changes)


@pytest.mark.anyio
class EventLogConformance:
    """What every `EventLog` does. Subclass it, and give the fixture `make_log` and the two methods."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The event loop: asyncio. Override it for a log that needs another."""
        return "asyncio"

    @pytest.fixture
    def make_log(self) -> MakeLog:
        """A function that makes logs over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_log")

    @pytest.fixture
    def made(self, make_log: MakeLog) -> tuple[SessionStore, EventLog]:
        return make_log()

    @pytest.fixture
    def store(self, made: tuple[SessionStore, EventLog]) -> SessionStore:
        return made[0]

    @pytest.fixture
    def log(self, made: tuple[SessionStore, EventLog]) -> EventLog:
        return made[1]

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Make a session of the store have expired one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_events(self, log: EventLog, key: UUID) -> None:
        """Make all events that a session has by now have been stored two days ago."""
        raise NotImplementedError("override the method age_events")

    async def _opened(self, store: SessionStore, **changes: Any) -> UUID:
        return (await store.create(new_session(**changes))).key

    async def _assert_gone(self, log: EventLog, *keys: UUID) -> None:
        for key in keys:
            assert await log.read(key, "instance.1", after=0) is None
            assert await log.append(key, [new_event(99)]) is None
        assert await log.heads(keys) == {}

    # Append and read

    async def test_an_event_is_read_as_it_was_stored(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        event = new_event(7, previous=3)
        first = await log.append(key, [event])
        assert first is not None
        assert first > 0
        page = await _page(log, key)
        assert page.events == [_stored(event, first)]
        assert (page.more, page.first, page.last) == (False, first, first)

    @pytest.mark.parametrize("kind", EventKind)
    async def test_events_of_every_kind_are_kept(self, store: SessionStore, log: EventLog, kind: EventKind) -> None:
        key = await self._opened(store)
        event = new_event(kind=kind, message=None if kind is EventKind.PRIMING else "{}")
        first = await log.append(key, [event])
        assert first is not None
        assert await _all_of(log, key) == [_stored(event, first)]

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(json.dumps({"name": "\0"}), id="escaped NUL"),
            pytest.param(json.dumps({"name": "\ud800"}), id="escaped surrogate"),
            pytest.param(json.dumps({"name": "名前 🦀 é"}, ensure_ascii=False), id="not ASCII"),
            pytest.param('{"b": 1,  "a": 2, "a": 3, "n": 1.0e2, "x": [null, "\'\\"$1?:a%s"]}', id="as written"),
            pytest.param(json.dumps({"name": "x" * 3_000_000}), id="3 MB"),
            pytest.param("", id="nothing"),
        ],
    )
    async def test_messages_come_back_to_the_letter(self, store: SessionStore, log: EventLog, text: str) -> None:
        key = await self._opened(store)
        await log.append(key, [new_event(message=text)])
        assert [event.message for event in await _all_of(log, key)] == [text]

    async def test_an_event_gets_the_next_sequence_of_its_session_whatever_its_stream(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        assert await log.append(key, [new_event(0, stream="instance.2"), new_event(1)]) == first + 1
        assert await log.append(key, [new_event(0, stream=STANDALONE_STREAM)]) == first + 3
        assert await log.append(key, [new_event(2)]) == first + 4
        streams = {
            "instance.1": [(first, 0), (first + 2, 1), (first + 4, 2)],
            "instance.2": [(first + 1, 0)],
            STANDALONE_STREAM: [(first + 3, 0)],
        }
        for stream, expected in streams.items():
            page = await _page(log, key, stream)
            assert [(event.sequence, event.position) for event in page.events] == expected
            assert (page.more, page.first, page.last) == (False, first, first + 4)

    async def test_positions_are_as_large_as_they_may_be(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        large = new_event(2**62, stream="名前 🦀 \\ ' %s " + "x" * 500, previous=2**62 - 1)
        first = await log.append(key, [large])
        assert first is not None
        assert await _all_of(log, key, large.stream) == [_stored(large, first)]

    async def test_events_of_several_sessions_do_not_mix(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(3)]
        for turn in range(4):
            for number, key in enumerate(keys):
                await log.append(key, [new_event(turn, message=f'"{number} {turn}"')])
        for number, key in enumerate(keys):
            events = await _all_of(log, key)
            assert [event.message for event in events] == [f'"{number} {turn}"' for turn in range(4)]
            assert [event.sequence for event in events] == list(range(events[0].sequence, events[0].sequence + 4))

    async def test_logs_of_one_namespace_see_the_same_events(self, make_log: MakeLog) -> None:
        (store, here), (_, there) = make_log(), make_log()
        key = await self._opened(store)
        first = await here.append(key, [new_event(0)])
        assert first is not None
        assert await there.append(key, [new_event(1)]) == first + 1
        assert await _all_of(here, key) == await _all_of(there, key)
        assert await here.heads([key]) == {key: first + 1}

    async def test_a_session_without_events_has_no_log(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        assert await log.read(key, "instance.1", after=0) is None
        assert await log.heads([key]) == {}

    async def test_a_stream_without_events_tells_how_far_the_log_goes(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0), new_event(1)])
        assert first is not None
        page = await _page(log, key, "another")
        assert (page.events, page.more, page.first, page.last) == ([], False, first, first + 1)

    async def test_what_is_known_is_not_read_again(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0), new_event(0, stream="instance.2"), new_event(1)])
        assert first is not None
        for after, expected in ((first - 1, [0, 1]), (first, [1]), (first + 1, [1]), (first + 2, []), (2**62, [])):
            page = await _page(log, key, after=after)
            assert [event.position for event in page.events] == expected
            assert (page.more, page.first, page.last) == (False, first, first + 2)

    async def test_a_stream_is_read_page_by_page(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        events = [new_event(number, stream=f"instance.{number % 2}") for number in range(30)]
        first = await log.append(key, events)
        assert first is not None
        assert await _all_of(log, key, "instance.1", limit=4) == [
            _stored(event, first + number) for number, event in enumerate(events) if number % 2
        ]
        page = await _page(log, key, "instance.1", limit=14)
        assert (len(page.events), page.more) == (14, True)
        page = await _page(log, key, "instance.1", limit=15)
        assert (len(page.events), page.more) == (15, False)

    async def test_large_events_are_read_page_by_page_whatever_the_limit(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key = await self._opened(store)
        sizes = [2_000_000, 10, 10, 900_000, 900_000, 900_000, 10, 2_000_000, 10]
        for number, size in enumerate(sizes):
            await log.append(key, [_sized(size, number)])
        assert [message_bytes(event) for event in await _all_of(log, key)] == sizes

    async def test_events_that_are_stored_while_others_are_read_come_with_the_next_page(
        self, make_log: MakeLog
    ) -> None:
        (store, here), (_, there) = make_log(), make_log()
        key = await self._opened(store)
        await there.append(key, [new_event(0)])
        after, seen = 0, []
        for number in range(1, 6):
            page = await _page(here, key, after=after)
            seen += [event.position for event in page.events]
            after = page.last
            await there.append(key, [new_event(number), new_event(number, stream="instance.2")])
        assert seen == list(range(5))

    # Many at once

    async def test_of_appends_at_once_each_keeps_its_events_together(self, make_log: MakeLog) -> None:
        made = [make_log() for _ in range(2)]
        key = await self._opened(made[0][0])
        appends = [
            [new_event(10 * number + part, stream=f"instance.{part % 2}") for part in range(number % 4 + 1)]
            for number in range(40)
        ]
        firsts = await asyncio.gather(
            *(made[number % 2][1].append(key, events) for number, events in enumerate(appends))
        )
        expected: dict[str, list[StoredEvent]] = {"instance.0": [], "instance.1": []}
        for first, events in zip(firsts, appends, strict=True):
            assert first is not None
            for offset, event in enumerate(events):
                expected[event.stream].append(_stored(event, first + offset))
        for stream, stored in expected.items():
            assert await _all_of(made[0][1], key, stream) == sorted(stored, key=lambda event: event.sequence)
        total = sum(map(len, appends))
        last = (await made[0][1].heads([key]))[key]
        taken = sorted(event.sequence for stored in expected.values() for event in stored)
        assert taken == list(range(last - total + 1, last + 1))

    async def test_appends_to_many_sessions_at_once_are_stored_in_each(
        self, store: SessionStore, log: EventLog
    ) -> None:
        keys = list(await asyncio.gather(*(self._opened(store) for _ in range(60))))
        unknown = [uuid.uuid4() for _ in range(10)]
        turns = [(key, turn) for turn in range(5) for key in [*keys, *unknown]]
        firsts = await asyncio.gather(*(log.append(key, [new_event(turn)]) for key, turn in turns))
        assert [first is None for first in firsts] == [key in unknown for key, _ in turns]
        for key in keys:
            events = await _all_of(log, key)
            assert sorted(event.position for event in events) == list(range(5))
        assert (await log.heads([*keys, *unknown])).keys() == set(keys)

    async def test_an_append_that_is_cancelled_disturbs_no_other(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        tasks = [asyncio.ensure_future(log.append(key, [new_event(number)])) for number in range(30)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        by_sequence = {event.sequence: event.position for event in await _all_of(log, key)}
        for number, outcome in enumerate(outcomes):
            if not isinstance(outcome, BaseException):
                assert outcome is not None
                assert by_sequence[outcome] == number
            else:
                assert number % 3 == 0

    # What may have been stored before

    async def test_what_was_stored_before_is_not_stored_again(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        events = [new_event(0), new_event(0, stream="instance.2"), new_event(1)]
        first = await log.append(key, events)
        assert first is not None
        for _ in range(2):
            assert await log.append(key, events, again=True) == first
        assert await log.append(key, [new_event(1)], again=True) == first + 2
        assert await log.heads([key]) == {key: first + 2}

    async def test_what_was_not_stored_before_is_stored(self, store: SessionStore, log: EventLog) -> None:
        key, other = await self._opened(store), await self._opened(store)
        await log.append(other, [new_event(0)])
        first = await log.append(key, [new_event(0)], again=True)
        assert first is not None
        assert await log.append(key, [new_event(0, stream="instance.2")], again=True) == first + 1
        assert await log.append(key, [new_event(1)], again=True) == first + 2
        assert await log.append(uuid.uuid4(), [new_event(0)], again=True) is None

    async def test_some_are_stored_and_others_were_before(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(2)]
        before = {(key, number): await log.append(key, [new_event(number)]) for key in keys for number in (0, 1)}
        calls = [(key, number) for number in range(4) for key in keys]
        firsts = await asyncio.gather(
            *(log.append(key, [new_event(number)], again=number < 3) for key, number in calls)
        )
        told = dict(zip(calls, firsts, strict=True))
        assert {call: told[call] for call in before} == before
        for key in keys:
            events = await _all_of(log, key)
            assert sorted(event.position for event in events) == [0, 1, 2, 3]
            assert {event.position: event.sequence for event in events} == {n: told[key, n] for n in range(4)}

    # Sessions that are not live

    async def test_events_of_a_session_that_is_not_live_are_not_stored(
        self, store: SessionStore, log: EventLog
    ) -> None:
        ended, expired = await self._opened(store), await self._opened(store)
        await store.end(ended, reason=EndReason.CLIENT)
        await self.expire(store, expired)
        await self._assert_gone(log, ended, expired, uuid.uuid4())

    async def test_of_a_session_with_events_that_has_expired_no_more_are_stored(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key, live = await self._opened(store), await self._opened(store)
        for session in (key, live):
            await log.append(session, [new_event(0)])
        before = await log.heads([key])
        await self.expire(store, key)
        firsts = await asyncio.gather(*(log.append(session, [new_event(1)]) for session in (key, live)))
        assert [first is None for first in firsts] == [True, False]
        assert await log.heads([key]) == before

    async def test_a_session_that_is_extended_after_its_expiry_goes_on_with_its_log(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        await self.expire(store, key)
        assert await store.touch([Activity(key=key, first_age=60.0, last_age=0.0)]) == set()
        assert await log.append(key, [new_event(1)]) == first + 1
        assert [event.position for event in await _all_of(log, key)] == [0, 1]

    @pytest.mark.parametrize("reason", EndReason)
    async def test_a_session_that_ends_loses_its_log(
        self, store: SessionStore, log: EventLog, reason: EndReason
    ) -> None:
        ended, other, without = [await self._opened(store) for _ in range(3)]
        for key in (ended, other):
            await log.append(key, [new_event(number) for number in range(20)])
        for key in (ended, without):
            assert await store.end(key, reason=reason)
        await self._assert_gone(log, ended, without)
        assert len(await _all_of(log, other)) == 20

    async def test_a_session_that_a_sweep_ends_loses_its_log(self, store: SessionStore, log: EventLog) -> None:
        expired, live = await self._opened(store), await self._opened(store)
        for key in (expired, live):
            await log.append(key, [new_event(0)])
        await self.expire(store, expired)
        store.retention = _SHORT
        assert (await _swept(store)).expired == 1
        await self._assert_gone(log, expired)
        assert len(await _all_of(log, live)) == 1

    async def test_a_session_that_ends_for_the_limit_loses_its_log(self, make_log: MakeLog) -> None:
        store, log = make_log()
        store.retention = RetentionPolicy(per_principal=1)
        first = await self._opened(store)
        await log.append(first, [new_event(0)])
        second = await self._opened(store)
        await self._assert_gone(log, first)
        assert await log.append(second, [new_event(0)]) is not None

    # How many and how large

    async def test_a_log_keeps_its_newest_events(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_events_per_session=20))
        key, other = await self._opened(store), await self._opened(store)
        await log.append(other, [new_event(0)])
        start = await log.append(key, [new_event(0)])
        assert start is not None
        for number in range(1, 70):
            first = await log.append(key, [new_event(number, stream=f"instance.{number % 2}")])
            assert first == start + number
            page = await _page(log, key)
            assert page.last == first
            # All that is kept is there, and no more is kept than may be, and not much less.
            assert 18 <= page.last - page.first + 1 <= 20 or number < 20
            kept = [*await _all_of(log, key, "instance.0"), *await _all_of(log, key, "instance.1")]
            assert sorted(event.sequence for event in kept) == list(range(page.first, page.last + 1))
        assert len(await _all_of(log, other)) == 1

    async def test_an_append_of_more_than_a_log_keeps_leaves_its_last_ones(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_events_per_session=10))
        key = await self._opened(store)
        await log.append(key, [new_event(number) for number in range(10)])
        await log.append(key, [new_event(number) for number in range(10, 60)])
        events = await _all_of(log, key)
        assert 9 <= len(events) <= 10
        assert [event.position for event in events] == list(range(60 - len(events), 60))

    async def test_a_log_keeps_no_more_bytes_than_it_may(self, make_log: MakeLog) -> None:
        limit = 2000
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=limit))
        key = await self._opened(store)
        sizes = random.Random(4)  # noqa: S311
        positions = iter(range(1000))
        for _ in range(60):
            events = [_sized(sizes.choice([20, 100, 600, 990]), next(positions)) for _ in range(sizes.choice([1, 2]))]
            first = await log.append(key, events)
            assert first is not None
            kept = await _all_of(log, key)
            assert [event.sequence for event in kept] == list(range(kept[0].sequence, first + len(events)))
            assert kept[-1] == _stored(events[-1], first + len(events) - 1)
            assert sum(map(message_bytes, kept)) <= limit

    async def test_bytes_are_counted_and_not_characters(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        for number in range(3):
            assert await log.append(key, [new_event(number, message="é" * 200)]) is not None
        assert [event.position for event in await _all_of(log, key)] == [1, 2]
        with pytest.raises(EventTooLarge):
            await log.append(key, [new_event(3, message="é" * 513)])

    async def test_events_without_a_message_take_no_bytes(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        await log.append(key, [_sized(1024, 0)])
        await log.append(key, [new_event(number, kind=EventKind.PRIMING, message=None) for number in range(1, 9)])
        assert len(await _all_of(log, key)) == 9

    async def test_an_event_as_large_as_all_of_a_log_is_kept_alone(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        await log.append(key, [_sized(500, number) for number in range(2)])
        await log.append(key, [_sized(1024, 2)])
        assert [event.position for event in await _all_of(log, key)] == [2]
        await log.append(key, [_sized(10, 3)])
        assert [event.position for event in await _all_of(log, key)] == [3]

    async def test_events_that_are_larger_than_all_of_a_log_are_not_stored(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        first = await log.append(key, [_sized(500, 0)])
        assert first is not None
        for events in ([_sized(1025, 1)], [_sized(600, 1), _sized(600, 2)]):
            with pytest.raises(EventTooLarge):
                await log.append(key, events)
        assert await log.append(key, [_sized(500, 1)]) == first + 1
        assert [event.position for event in await _all_of(log, key)] == [0, 1]

    # How old

    async def test_a_sweep_removes_events_that_are_too_old_and_nothing_else(
        self, store: SessionStore, log: EventLog
    ) -> None:
        keys = [await self._opened(store) for _ in range(3)]
        for key in keys[:2]:
            await log.append(key, [new_event(number) for number in range(5)])
            await self.age_events(log, key)
        for key in keys[1:]:
            await log.append(key, [new_event(number) for number in range(5, 8)])
        last = await log.heads(keys)
        assert await _events_swept(log) == 10
        assert await _events_swept(log) == 0
        assert await log.heads(keys) == last
        page = await _page(log, keys[0])
        assert (page.events, page.first, page.last) == ([], page.last + 1, last[keys[0]])
        for key in keys[1:]:
            page = await _page(log, key)
            assert [event.position for event in page.events] == [5, 6, 7]
            assert page.first == page.events[0].sequence

    async def test_a_log_that_was_swept_goes_on_where_it_was(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0), new_event(1)])
        assert first is not None
        await self.age_events(log, key)
        assert await _events_swept(log) == 2
        assert await log.append(key, [new_event(2)]) == first + 2
        page = await _page(log, key)
        assert [event.position for event in page.events] == [2]
        assert (page.first, page.last) == (first + 2, first + 2)
        # And gets old again.
        assert await _events_swept(log) == 0
        await self.age_events(log, key)
        assert await _events_swept(log) == 1

    async def test_what_is_kept_as_long_as_its_session_is_not_swept(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_age=None))
        key = await self._opened(store)
        await log.append(key, [new_event(0)])
        await self.age_events(log, key)
        assert await _events_swept(log) == 0
        assert len(await _all_of(log, key)) == 1

    async def test_a_sweep_goes_on_step_by_step(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(4)]
        for number, key in enumerate(keys):
            await log.append(key, [new_event(position) for position in range(5 * number + 2)])
            await self.age_events(log, key)
            await log.append(key, [new_event(100)])
        report = await log.sweep(limit=8)
        assert 0 < report.removed <= 16
        assert report.more
        assert report.removed + await _events_swept(log, limit=8) == 38
        for key in keys:
            assert [event.position for event in await _all_of(log, key)] == [100]

    async def test_several_who_sweep_at_once_remove_each_event_once(self, make_log: MakeLog) -> None:
        made = [make_log() for _ in range(3)]
        keys = [await self._opened(made[0][0]) for _ in range(12)]
        for key in keys:
            await made[0][1].append(key, [new_event(number) for number in range(15)])
            await self.age_events(made[0][1], key)
        removed = 0
        for _ in range(200):
            reports = await asyncio.gather(*(log.sweep(limit=20) for _, log in made))
            removed += sum(report.removed for report in reports)
            if not any(report.removed or report.more for report in reports):
                break
        assert removed == 180

    # Namespaces

    async def test_the_events_of_another_namespace_do_not_exist(self, make_log: MakeLog) -> None:
        (_, mine), (their_store, theirs) = make_log("mine"), make_log("theirs")
        assert (mine.namespace, theirs.namespace) == ("mine", "theirs")
        key = await self._opened(their_store)
        await self._assert_gone(mine, key)
        await theirs.append(key, [new_event(0)])
        await self._assert_gone(mine, key)
        await mine.follow([key])
        assert await mine.append(key, [new_event(0)], again=True) is None
        assert [event.position for event in await _all_of(theirs, key)] == [0]
        await self.age_events(theirs, key)
        assert await _events_swept(mine) == 0
        assert await _events_swept(theirs) == 1

    # Heads, and hints

    async def test_heads_tell_of_all_that_have_a_log(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(3)]
        assert await log.heads([]) == {}
        last = {}
        for number, key in enumerate(keys[:2], 1):
            first = await log.append(key, [new_event(position) for position in range(number)])
            assert first is not None
            last[key] = first + number - 1
        assert await log.heads([*keys, uuid.uuid4()]) == last
        assert await log.heads(set(keys)) == last

    async def test_to_follow_changes_nothing(self, store: SessionStore, log: EventLog) -> None:
        key, without = await self._opened(store), await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        for _ in range(2):
            await log.follow([key, without, uuid.uuid4()])
        await log.follow([])
        assert await log.append(key, [new_event(1)]) == first + 1
        assert await log.heads([key, without]) == {key: first + 1}

    async def test_who_waits_for_hints_may_be_cancelled(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        for number in range(3):
            listening = asyncio.ensure_future(log.listen(lambda _: None))
            await asyncio.sleep(0.01)
            assert not listening.done()
            await log.follow([key])
            assert await log.append(key, [new_event(number)]) is not None
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            assert listening.cancelled()

    # Instances

    async def test_an_instance_that_notes_that_it_runs_is_known_until_it_stops(self, make_log: MakeLog) -> None:
        (_, here), (_, there) = make_log(), make_log()
        names = [uuid.uuid4().hex for _ in range(3)]
        assert await here.last_beats(names) == {}
        assert await here.last_beats([]) == {}
        for name in names[:2]:
            for _ in range(2):
                await there.beat(f"host:1234:{name}")
        beats = await here.last_beats(names)
        assert beats.keys() == set(names[:2])
        assert all(timedelta(0) <= ago < timedelta(minutes=1) for ago in beats.values())
        for _ in range(2):
            await there.retire(f"host:1234:{names[0]}")
        assert (await here.last_beats(names)).keys() == {names[1]}
        await there.beat(f"host:1234:{names[0]}")
        assert (await here.last_beats(names)).keys() == set(names[:2])

    async def test_a_beat_is_as_old_as_it_is(self, log: EventLog) -> None:
        early, late = uuid.uuid4().hex, uuid.uuid4().hex
        await log.beat(f"host:1:{early}")
        await asyncio.sleep(0.05)
        await log.beat(f"host:1:{late}")
        beats = await log.last_beats([early, late])
        assert beats[early] - beats[late] > timedelta(milliseconds=20)
        await log.beat(f"host:1:{early}")
        beats = await log.last_beats([early, late])
        assert beats[early] <= beats[late]

    # The log's own life

    async def test_a_log_may_be_opened_and_closed_more_than_once(self, make_log: MakeLog) -> None:
        _, log = make_log()
        await log.open()
        await log.open()
        await log.aclose()
        await log.aclose()
