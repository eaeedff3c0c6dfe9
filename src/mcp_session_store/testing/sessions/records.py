"""Cases of the suite for session stores: creating and loading sessions, and replacing their handshakes."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.errors import SessionConflict
from mcp_session_store.records import EndReason, Principal
from mcp_session_store.retention import NEW_SESSION_LIFETIME, RetentionPolicy
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import MakeStore, StoreSuite, with_policy

if TYPE_CHECKING:
    from mcp_session_store.store import SessionStore


class Records(StoreSuite):
    """Creating and loading sessions, and replacing their handshakes."""

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
            created = await with_policy(make_store, policy).create(new_session())
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
