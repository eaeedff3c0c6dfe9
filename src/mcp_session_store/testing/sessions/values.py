"""Cases of the suite for session stores: values that cannot be stored."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.errors import ConfigurationError, InvalidValue
from mcp_session_store.records import EndReason, JournalEntry, Principal
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.refusals import UNSTORABLE_TEXTS, refused
from mcp_session_store.testing.sessions.suite import StoreSuite

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp_session_store.records import NewSession
    from mcp_session_store.store import SessionStore

_INITIALIZE_FIELDS = ["initialize_params", "protocol_version", "client_name", "client_version"]
_JOURNAL_FIELDS = ["method", "subject", "params"]


def _session_with(field: str, text: str) -> NewSession:
    return new_session(**{field: Principal(digest=bytes(32), display=text) if field == "principal" else text})


class Values(StoreSuite):
    """`InvalidValue`: which calls raise it, and that nothing of them is stored."""

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    @pytest.mark.parametrize("field", [*_INITIALIZE_FIELDS, "principal", "instance"])
    async def test_a_session_with_a_text_that_cannot_be_stored_is_refused(
        self, store: SessionStore, field: str, text: str
    ) -> None:
        session = _session_with(field, text)
        await refused(store.create(session))
        assert await store.load(session.key) is None
        created = await store.create(new_session(key=session.key))
        assert await store.load(session.key) == created

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_sessions_beside_one_that_cannot_be_stored_are_stored(self, store: SessionStore, text: str) -> None:
        sessions = [new_session() for _ in range(20)]
        sessions[3] = _session_with("initialize_params", text)
        sessions[11] = _session_with("client_name", text)
        outcomes = await asyncio.gather(*map(store.create, sessions), return_exceptions=True)
        assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, InvalidValue)] == [3, 11]
        loaded = await asyncio.gather(*(store.load(session.key) for session in sessions))
        assert loaded == [None if number in (3, 11) else outcome for number, outcome in enumerate(outcomes)]

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_an_instance_with_a_name_that_cannot_be_stored_claims_nothing(
        self, store: SessionStore, text: str
    ) -> None:
        created = await store.create(new_session())
        other = await store.create(new_session())
        outcomes = await asyncio.gather(
            store.claim(created.key, instance=text, restores=0),
            store.claim(other.key, instance="instance-b", restores=0),
            return_exceptions=True,
        )
        assert isinstance(outcomes[0], InvalidValue)
        assert await store.load(created.key) == created
        assert await store.load(other.key) == outcomes[1]

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_a_report_of_an_instance_with_a_name_that_cannot_be_stored_changes_nothing(
        self, store: SessionStore, text: str
    ) -> None:
        created, other = await store.create(new_session()), await store.create(new_session())
        report = [
            Activity(key=created.key, first_age=0.0, last_age=0.0, claimed_by=text, restores=1),
            Activity(key=other.key, first_age=0.0, last_age=0.0),
        ]
        await refused(store.touch(report))
        assert await store.load(created.key) == created
        assert await store.load(other.key) == other

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    @pytest.mark.parametrize("field", _INITIALIZE_FIELDS)
    async def test_what_cannot_be_stored_replaces_nothing(self, store: SessionStore, field: str, text: str) -> None:
        created = await store.create(new_session())
        fields: dict[str, str] = dict.fromkeys(_INITIALIZE_FIELDS, "{}") | {field: text}
        since = (await store.changes(None)).until
        await refused(store.replace_initialize(created.key, **fields))
        assert await store.load(created.key) == created
        assert (await store.changes(since)).changes == []

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    @pytest.mark.parametrize("field", _JOURNAL_FIELDS)
    async def test_an_entry_that_cannot_be_stored_leaves_the_journal_as_it_is(
        self, store: SessionStore, field: str, text: str
    ) -> None:
        created = await store.create(new_session())
        entry: dict[str, Any] = {"method": "m", "subject": "s", "params": "{}"}
        assert await store.write_journal(created.key, **entry) == 1
        await refused(store.write_journal(created.key, **entry | {field: text}))
        assert await store.read_journal(created.key) == [JournalEntry(**entry)]
        record = await store.load(created.key)
        assert record is not None
        assert record.revision == 1

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    @pytest.mark.parametrize("field", ["method", "subject"])
    async def test_an_entry_that_cannot_be_stored_cannot_be_removed_either(
        self, store: SessionStore, field: str, text: str
    ) -> None:
        created = await store.create(new_session())
        entry: dict[str, Any] = {"method": "m", "subject": "s", "params": None}
        await refused(store.write_journal(created.key, **entry | {field: text}))
        assert await store.load(created.key) == created

    async def test_texts_with_other_control_characters_are_stored(self, store: SessionStore) -> None:
        text = "\x01\t\r\n\x7f\x85\u2028\ufffe\U0010ffff"
        session = new_session(key=uuid.uuid4(), client_name=text, client_version=text, instance=text)
        created = await store.create(session)
        assert (created.client_name, created.client_version, created.instance_hint) == (text, text, text)
        assert await store.load(session.key) == created
        assert await store.write_journal(session.key, method="m", subject=text, params=text) == 1
        assert await store.read_journal(session.key) == [JournalEntry(method="m", subject=text, params=text)]

    @pytest.mark.parametrize("key", ["a-session-id", "", None, 7, b"0" * 16], ids=repr)
    async def test_a_key_that_is_no_uuid_is_refused_and_disturbs_no_other_call(
        self, store: SessionStore, key: Any
    ) -> None:
        sessions = [await store.create(new_session()) for _ in range(3)]
        report = [Activity(key=one, first_age=0.0, last_age=0.0) for one in (sessions[0].key, key)]
        fields = dict.fromkeys(_INITIALIZE_FIELDS, "{}")
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: store.create(new_session(key=key)),
            lambda: store.load(key),
            lambda: store.find(key),
            lambda: store.claim(key, instance="instance-b", restores=0),
            lambda: store.replace_initialize(key, **fields),
            lambda: store.write_journal(key, method="m", subject="s", params="{}"),
            lambda: store.read_journal(key),
            lambda: store.touch(report),
            lambda: store.end(key, reason=EndReason.CLIENT),
        ]
        # All at once, so that calls of a kind share a statement where a store has them do so.
        outcomes = await asyncio.gather(
            *(call() for call in calls),
            *(store.load(session.key) for session in sessions),
            store.write_journal(sessions[1].key, method="m", subject="s", params="{}"),
            store.end(sessions[2].key, reason=EndReason.CLIENT),
            return_exceptions=True,
        )
        for refusal in outcomes[: len(calls)]:
            assert isinstance(refusal, ConfigurationError)
            # It may be a session id.
            assert "a-session-id" not in str(refusal)
        assert [outcome for outcome in outcomes[len(calls) :] if isinstance(outcome, BaseException)] == []
        assert outcomes[-2:] == [1, True]
