"""A session belongs to the principal that opened it; to all others it is one that does not exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store.retention import NEW_SESSION_LIFETIME
from tests.support.asgi import Client, seen_by_a_client, until
from tests.support.instances import Notes, instance, principal, wait_for
from tests.support.internals import owners_in, registry_of, report_activity

if TYPE_CHECKING:
    from tests.support.asgi import Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.http import Message
    from tests.support.instances import RequestContext

pytestmark = pytest.mark.anyio

UNKNOWN = "0" * 32
PING: Message = {"jsonrpc": "2.0", "id": 7, "method": "ping"}

ALICE = principal("app", subject="alice", issuer="https://issuer")
STRANGERS = {
    "anonymous": None,
    "another subject": principal("app", subject="bob", issuer="https://issuer"),
    "another issuer": principal("app", subject="alice", issuer="https://other"),
    "another client": principal("other", subject="alice", issuer="https://issuer"),
    "no subject": principal("app", issuer="https://issuer"),
    "no issuer": principal("app", subject="alice"),
    "only a client": principal("app"),
    "fields that run together": principal("app alice", issuer="https://issuer"),
}

REQUESTS: dict[str, tuple[str, Message | bytes | None]] = {
    "a call": ("POST", {**PING, "method": "tools/call", "params": {"name": "add", "arguments": {"a": 1, "b": 1}}}),
    "initialize": ("POST", {**PING, "method": "initialize", "params": {}}),
    "a notification": ("POST", {"jsonrpc": "2.0", "method": "notifications/initialized"}),
    "an answer": ("POST", {"jsonrpc": "2.0", "id": 1, "result": {}}),
    "no JSON": ("POST", b"{"),
    "GET": ("GET", None),
    "DELETE": ("DELETE", None),
    "PUT": ("PUT", PING),
    "HEAD": ("HEAD", None),
}


def same_request(client: Client, kind: str) -> Exchange:
    method, message = REQUESTS[kind]
    return client.open(method, message)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS.keys())
async def test_a_wrong_principal_gets_the_same_answer_as_an_unknown_session(
    store: FaultyStore, kind: str, stranger: Any, resident: bool
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client(user=ALICE).handshake()
    async with instance(store) as one:
        owner = one.client(session_id, user=ALICE)
        if resident:
            assert (await owner.ping()).status == 200
            # The restore is recorded now, and not at some moment below.
            await report_activity(one.manager)
        before = await store.record(session_id)
        seen = len(one.notes.seen)
        store.calls.clear()

        wrong = await same_request(one.client(session_id, user=stranger), kind).answer()
        unknown = await same_request(one.client(UNKNOWN, user=stranger), kind).answer()

        assert seen_by_a_client(wrong) == seen_by_a_client(unknown)
        assert wrong.status == (405 if kind in ("PUT", "HEAD") else 404)
        assert session_id not in str(wrong)
        # Nothing was changed, and nothing restored.
        await anyio.wait_all_tasks_blocked()
        assert set(store.calls) <= {"load"}
        assert await store.record(session_id) == before
        assert len(one.notes.seen) == seen
        assert one.residents == resident
        assert (await owner.ping()).status == 200


@pytest.mark.parametrize("stranger", [ALICE, principal("other")], ids=["alice", "other"])
async def test_a_session_that_was_opened_without_a_principal_is_nobodys_who_has_one(
    store: FaultyStore, stranger: Any
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store) as one:
        for kind in ("a call", "GET", "DELETE"):
            assert (await same_request(one.client(session_id, user=stranger), kind).answer()).status == 404
        assert one.residents == 0
        assert (await one.client(session_id).ping()).status == 200
        for kind in ("a call", "GET", "DELETE"):
            assert (await same_request(one.client(session_id, user=stranger), kind).answer()).status == 404
        assert (await one.client(session_id).ping()).status == 200


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
@pytest.mark.parametrize("kind", ["a call", "GET", "DELETE"])
async def test_a_wrong_principal_cannot_tell_a_session_from_an_unknown_one_while_the_store_is_down(
    store: FaultyStore, kind: str, resident: bool
) -> None:
    async with instance(store) as one:
        session_id = await one.client(user=ALICE).handshake()
        if not resident:
            await one.terminate(session_id)
            await until(lambda: one.residents == 0)
        store.down()
        stranger = principal("other")
        wrong = await same_request(one.client(session_id, user=stranger), kind).answer()
        unknown = await same_request(one.client(UNKNOWN, user=stranger), kind).answer()
        assert seen_by_a_client(wrong) == seen_by_a_client(unknown)


async def test_a_principal_is_its_client_issuer_and_subject_and_not_its_token(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client(user=ALICE).handshake()
    refreshed = principal("app", subject="alice", issuer="https://issuer")
    refreshed.access_token.token = "another token"
    async with instance(store) as one:
        assert (await one.client(session_id, user=refreshed).ping()).status == 200
        assert (await one.client(session_id, user=ALICE).ping()).status == 200
        assert (await one.client(session_id, user=refreshed).delete()).status == 200


async def test_the_principal_that_is_stored_is_the_one_whose_request_opened_the_session(store: FaultyStore) -> None:
    async with instance(store) as one:
        commit = store.hold("create")
        alice = one.client(user=ALICE).open_initialize()
        bob = one.client(user=principal("bob")).open_initialize()
        await until(lambda: commit.calls == 2)
        commit.release()
        for exchange, name in ((alice, "app"), (bob, "bob")):
            session_id = (await exchange.answer()).session_id
            assert session_id is not None
            record = await store.record(session_id)
            assert record is not None
            assert record.principal is not None
            assert record.principal.display.split()[0] == name


async def test_the_right_principals_first_request_is_not_failed_by_a_wrong_ones(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client(user=ALICE).handshake()
    notes = Notes()
    reached, proceed = anyio.Event(), anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        reached.set()
        await proceed.wait()

    notes.on_initialize = hold
    async with instance(store, notes, json_response=json_response) as one:
        wrong = one.client(session_id, user=principal("mallory"))
        early = wrong.open_request("ping")
        right = one.client(session_id, user=ALICE).open_call("add", {"a": 1, "b": 2})
        late = wrong.open_request("ping")
        await wait_for(reached)
        during = [same_request(wrong, kind) for kind in ("a call", "GET", "DELETE")]
        # A stranger does not wait for the restore of a session that does not exist for him.
        for exchange in (early, late, *during):
            assert (await exchange.answer()).status == 404
        proceed.set()
        assert (await right.answer()).text == "3"
        (replayed,) = notes.replayed("initialize")
        assert replayed.request.user is ALICE


async def test_a_wrong_principal_does_not_keep_a_session_busy_or_prolong_it(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client(user=ALICE)
        assert (await client.initialize()).status == 200
        session_id = client.session_id
        assert session_id is not None
        wrong = one.client(session_id, user=principal("mallory"))
        for kind in ("a call", "a notification", "GET"):
            assert (await same_request(wrong, kind).answer()).status == 404
        (resident,) = registry_of(one.manager)
        assert resident.pins == 0
        await report_activity(one.manager)
        assert store.touches == []
        assert await store.expiry(session_id) == NEW_SESSION_LIFETIME


async def test_the_sdks_table_of_owners_is_kept_true(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client(user=ALICE)
        session_id = await client.handshake()
        assert owners_in(one.manager)[session_id]["client_id"] == "app"
        await one.client().handshake()
        assert list(owners_in(one.manager)) == [session_id]
        await client.delete()
        assert owners_in(one.manager) == {}
    async with instance(store) as one:
        session_id = await one.client(user=ALICE).handshake()
    async with instance(store) as one:
        await one.client(session_id, user=ALICE).ping()
        assert owners_in(one.manager)[session_id]["subject"] == "alice"
