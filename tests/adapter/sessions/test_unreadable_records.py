"""Sessions whose record cannot be read: unknown to their client, logged once, counted, and nobody else's concern."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from mcp_session_store import session_key, telemetry
from mcp_session_store.adapter import refusals
from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.records import Principal
from tests.support.instances import instance, principal
from tests.support.internals import rows_of

if TYPE_CHECKING:
    from tests.support.asgi import Client
    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio

ALICE = principal("alice")
SECRET = "s3cret"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the counter of unreadable records was told."""
    added: list[int] = []

    class Counter:
        def add(self, amount: int, _: dict[str, str]) -> None:
            added.append(amount)

    monkeypatch.setattr(telemetry, "unreadable", Counter())
    return added


def of_unreadable(caplog: pytest.LogCaptureFixture, session_id: str) -> list[str]:
    """The log records about the session; none of any may hold its id, or what is stored."""
    assert session_id not in caplog.text
    assert SECRET not in caplog.text
    return [text for text in caplog.messages if str(session_key(session_id)) in text]


@pytest.mark.parametrize("params", [f'["{SECRET}"]', f'"{SECRET}"', f'{{"{SECRET}', "null", "7", "[" * 100_000])
async def test_params_that_are_no_object_make_the_session_unknown(
    store: FaultyStore, params: str, counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
        good_id = await gone.client().handshake()
    row = rows_of(store.inner)[session_key(session_id)]
    row.record = dataclasses.replace(row.record, initialize_params=params)
    async with instance(store) as one:
        unknown = await one.client("0" * 32).call("add", {"a": 1, "b": 2})
        for _ in range(2):
            answer = await one.client(session_id).call("add", {"a": 1, "b": 2})
            assert (answer.status, answer.body) == (404, unknown.body)
        assert (await one.client(good_id).call("add", {"a": 1, "b": 2})).text == "3"
        one.assert_seats_match()
    (logged,) = of_unreadable(caplog, session_id)
    assert "check --rows" in logged
    assert counted == [1, 1]


async def test_a_journal_that_cannot_be_read_makes_the_session_unknown(
    store: FaultyStore, counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    await store.inner.write_journal(session_key(session_id), method="m", subject="", params=f'"{SECRET}"')
    async with instance(store) as one:
        assert (await one.client(session_id).ping()).status == 404
        assert one.notes.seen == []
    assert len(of_unreadable(caplog, session_id)) == 1
    assert counted == [1]


async def status_of(client: Client, method: str) -> int:
    if method == "GET":
        return (await (await client.get_stream()).answer()).status
    return (await (client.ping() if method == "POST" else client.delete())).status


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_a_stranger_learns_and_causes_nothing_by_a_session_that_cannot_be_read(
    store: FaultyStore, method: str, counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client(user=ALICE).handshake()
    digest = Principal.of(client_id="alice").digest
    async with instance(store) as one:
        store.failing(RecordUnreadable("created_at", digest=digest, digest_known=True), "load")
        for user in (principal("other"), None):
            assert await status_of(one.client(session_id, user=user), method) == 404
        assert of_unreadable(caplog, session_id) == []
        assert counted == []
        assert await status_of(one.client(session_id, user=ALICE), method) == 404
        assert "created_at" in of_unreadable(caplog, session_id)[0]
        # The owner of a session whose digest cannot be read cannot be told from others.
        store.failing(RecordUnreadable("principal_digest"), "load")
        assert await status_of(one.client(session_id, user=ALICE), method) == 404
        assert counted == [1, 1]
        store.up()
        assert (await one.client(session_id, user=ALICE).ping()).status == 200


async def test_the_sessions_that_were_logged_are_not_kept_for_ever(
    store: FaultyStore, counted: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MAX_REPORTED", 1)
    async with instance(store) as one:
        store.failing(RecordUnreadable("created_at"), "load")
        for session_id in ("1" * 32, "2" * 32, "1" * 32):
            assert (await one.client(session_id).ping()).status == 404
    assert len(of_unreadable(caplog, "1" * 32)) == 2
