"""Conformance tests of the `SessionStore` contract, for anybody who writes a store. Needs pytest.

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
```

Write `pytest.register_assert_rewrite("mcp_session_store.testing")` into your `conftest.py`, before the import: a
test that fails then says what it compared. The tests are asynchronous and run under the pytest plugin of anyio,
which this package depends on.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.errors import SessionConflict
from mcp_session_store.records import Activity, EndReason, NewSession, Principal
from mcp_session_store.retention import NEW_SESSION_LIFETIME
from mcp_session_store.store import SessionStore

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["MakeStore", "SessionStoreConformance", "new_session"]

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


@pytest.mark.anyio
class SessionStoreConformance:
    """What every `SessionStore` does. Subclass it, and give the fixture `make_store` and the method `expire`."""

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

    async def test_a_claimed_session_expires_no_more(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        claimed = await store.claim(created.key, instance="instance-b", restores=0)
        assert claimed is not None
        assert claimed.expires_at is None

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

    async def test_activity_makes_a_session_expire_no_more(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        assert await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)]) == set()
        record = await store.load(created.key)
        assert record is not None
        assert record.expires_at is None
        assert record.last_seen_at >= created.last_seen_at
        assert record.created_at == created.created_at

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
            assert record.expires_at is None

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
        assert await theirs.load(created.key) == created

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
