"""Requests that are refused: what each kind of request gets, for each cause, and what is read of it before."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, get_args

import pytest
from mcp.server.streamable_http import StreamableHTTPServerTransport

from mcp_session_store import StoreUnavailable
from mcp_session_store.adapter import refusals, responses
from mcp_session_store.adapter.responses import (
    MemoryFull,
    RestoreFailed,
    SessionNotFound,
    ShuttingDown,
    TooManyWait,
    WhyNotFound,
)
from mcp_session_store.errors import RecordUnreadable, SchemaMissing, SessionLimitReached, StoreBusy, StoreClosed
from tests.support.asgi import seen_by_a_client, until
from tests.support.http import INITIALIZE_PARAMS, SESSION_ID, assert_not_handled, assert_unavailable
from tests.support.instances import instance, principal
from tests.support.internals import registry_of, resident_of
from tests.support.pages import section_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

    from tests.support.faulty_stores import FaultyStore
    from tests.support.http import Message

pytestmark = pytest.mark.anyio

INITIALIZE: Message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": INITIALIZE_PARAMS}
REQUEST: Message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "initialize"}}
NOTIFICATION: Message = {"jsonrpc": "2.0", "method": "notifications/initialized"}
ANSWERS: Sequence[Message] = (
    {"jsonrpc": "2.0", "id": 1, "result": {}},
    {"jsonrpc": "2.0", "id": 1, "error": {"code": -1, "message": "no"}},
)
PART = 64 * 1024
UNKNOWN = "0" * 32


async def opened(store: FaultyStore, user: object = None) -> str:
    """Return the id of a session that is not in memory."""
    async with instance(store) as gone:
        return await gone.client(user=user).handshake()


# The table of docs/reference/answers.md

ERRORS: dict[str, Sequence[Exception]] = {
    "the session is unknown": [*map(SessionNotFound, get_args(WhyNotFound)), RecordUnreadable("a column")],
    "the database does not answer": [
        StoreUnavailable("away"),
        TooManyWait("away"),
        StoreBusy("busy"),
        StoreClosed("closed"),
    ],
    "the schema of the database does not fit": [SchemaMissing("no tables")],
    "all sessions in memory are in use": [MemoryFull()],
    "the policy allows no more sessions": [SessionLimitReached("one more")],
    "the session cannot be restored now": [RestoreFailed("too long")],
    "the server is shutting down": [ShuttingDown()],
    "an error in this package": [RuntimeError("a bug")],
}
"""Errors of each cause, by the beginning of its row."""
KINDS: dict[str, tuple[str, Sequence[Message | None]]] = {
    "`initialize`": ("POST", [INITIALIZE]),
    "other request with an id": ("POST", [REQUEST]),
    "notification, or answer to the server": ("POST", [NOTIFICATION, *ANSWERS]),
    "GET": ("GET", [None]),
    "DELETE": ("DELETE", [None]),
}


def table() -> list[dict[str, str]]:
    """Return the rows of the table of refused requests."""
    section = section_of("reference/answers.md", "## Answers to requests that are refused")
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def scope_of(method: str) -> Scope:
    return {"type": "http", "method": method, "headers": []}


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    for row in table():
        cause = row.pop("cause")
        reasons = re.findall("`([^`]+)`", row.pop("counted as"))
        (errors,) = (errors for beginning, errors in ERRORS.items() if cause.startswith(beginning))
        assert row.keys() == KINDS.keys()
        assert list(dict.fromkeys(map(refusals.reason_of, errors))) == reasons
        for error in errors:
            answer = responses.answer_to(error)
            for kind, expected in row.items():
                method, messages = KINDS[kind]
                for message in messages if expected in ("404", "503", "200, error") else ():
                    body = b"" if message is None else json.dumps(message).encode()
                    response = responses.response_to(answer, scope_of(method), body)
                    content = json.loads(bytes(response.body))
                    assert str(response.status_code) == expected.removesuffix(", error"), (cause, kind)
                    assert content["id"] == (1 if expected == "200, error" else None)
                    assert ("retry-after" in response.headers) is (response.status_code == 503)
                    assert SESSION_ID not in response.headers


def test_the_table_has_a_row_for_each_cause() -> None:
    assert len(table()) == len(ERRORS)
    reasons = {responses.answer_to(error).reason for errors in ERRORS.values() for error in errors}
    assert reasons == {answer.reason for answer in vars(responses).values() if isinstance(answer, responses.Answer)} - {
        ""
    }


# Over HTTP


@pytest.mark.parametrize("request_id", [0, 1, -1, 2**63, 2**200, "a", "", "1", "ü\0\n", "x" * 10_000], ids=str)
async def test_a_call_is_refused_with_its_id(store: FaultyStore, request_id: str | int) -> None:
    session_id = await opened(store)
    async with instance(store) as one:
        store.down("load")
        answer = await one.client(session_id).post({**REQUEST, "id": request_id})
        assert_not_handled(answer)
        assert answer.messages[0]["id"] == request_id
        assert type(answer.messages[0]["id"]) is type(request_id)
        # Nothing else depends on the id.
        assert answer.messages[0] | {"id": 1} == (await one.client(session_id).post(REQUEST)).messages[0]


async def test_what_has_no_answer_in_json_rpc_is_refused_by_http(store: FaultyStore) -> None:
    session_id = await opened(store)
    async with instance(store) as one:
        store.down("load")
        client = one.client(session_id)
        for message in (INITIALIZE, NOTIFICATION, *ANSWERS):
            assert_unavailable(await client.post(message))
        assert_unavailable(await client.open("GET").answer())
        assert_unavailable(await client.delete())
        store.up()
        assert (await client.ping()).status == 200


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/json, text/event-stream", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        (None, "application/json"),
        ("text/event-stream", "text/event-stream; charset=utf-8"),
    ],
)
async def test_a_call_is_refused_as_its_client_can_read_it(
    store: FaultyStore, json_response: bool, accept: str | None, content_type: str
) -> None:
    session_id = await opened(store)
    async with instance(store, json_response=json_response) as one:
        store.down("load")
        exchange = one.client(session_id).open_request("ping", request_id="a\nb", accept=accept)
        answer = await exchange.answer()
        assert_not_handled(answer)
        assert answer.headers["content-type"] == content_type
        assert [message["id"] for message in answer.messages] == ["a\nb"]


async def test_the_answer_does_not_tell_which_session_is_in_memory_or_exists(store: FaultyStore) -> None:
    alice, bob = principal("alice"), principal("bob")
    session_id = await opened(store, alice)
    async with instance(store) as one:
        resident = one.client(user=alice)
        await resident.handshake()
        store.down("load")
        answers = [
            await one.client(asked, user=bob).post(REQUEST) for asked in (resident.session_id, session_id, UNKNOWN)
        ]
        for answer in answers:
            assert_not_handled(answer)
        assert len({str(seen_by_a_client(answer)) for answer in answers}) == 1


@pytest.mark.parametrize(
    "body", [b"nonsense", b"", b"[]", b"{}", b'"\xff"', b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]']
)
async def test_a_body_that_is_no_message_gets_the_sdks_own_answer(store: FaultyStore, body: bytes) -> None:
    session_id = await opened(store)
    async with instance(store) as one:
        resident = one.client()
        await resident.handshake()
        of_the_sdk = await resident.post(body)
        assert of_the_sdk.status == 400
        del of_the_sdk.headers[SESSION_ID]
        store.down("load")
        assert seen_by_a_client(await one.client(session_id).post(body)) == seen_by_a_client(of_the_sdk)


async def test_a_call_that_only_names_a_handshake_fails_alone_when_it_cannot_be_served(
    store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    async with instance(store, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        with monkeypatch.context() as patch:
            patch.setattr(StreamableHTTPServerTransport, "handle_request", broken)
            assert_not_handled(await client.post(REQUEST))
            assert_unavailable(await client.post(INITIALIZE))
        assert (await client.ping()).status == 200


# What is read


def long_call(size: int = 4 * 1024 * 1024) -> list[bytes]:
    """Return the parts of a long call, whose id is its last key."""
    begin, end = b'{"jsonrpc": "2.0", "method": "ping", "params": {"x": "', b'"}, "id": "the last"}'
    body = begin + b"x" * (size - len(begin) - len(end)) + end
    return [body[i : i + PART] for i in range(0, size, PART)]


async def test_the_id_is_found_at_the_end_of_the_longest_body(store: FaultyStore) -> None:
    session_id = await opened(store)
    async with instance(store) as one:
        store.down("load")
        answer = await one.client(session_id).open_parts(*long_call()).answer()
        assert_not_handled(answer)
        assert answer.messages[0]["id"] == "the last"
        store.up()
        assert (await one.client(session_id).open_parts(*long_call()).answer()).result == {}
        # And by the copy that is there now.
        assert (await one.client(session_id).open_parts(*long_call()).answer()).result == {}


async def test_a_long_body_stays_with_its_client_while_the_request_waits(store: FaultyStore) -> None:
    session_id = await opened(store)
    async with instance(store) as one:
        load = store.hold("load")
        exchange = one.client(session_id).open_parts(*long_call())
        await load.wait_entered()
        assert exchange.unread >= 62
        load.release()
        assert (await exchange.answer()).result == {}


async def test_a_body_that_does_not_arrive_is_waited_for_briefly(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "READ_TIMEOUT", 0.05)
    session_id = await opened(store)
    async with instance(store) as one:
        store.down("load")
        assert_unavailable(await one.client(session_id).open_parts(*long_call()[:-1], whole=False).answer())


async def test_a_body_that_is_longer_than_may_be_read_is_refused_without_its_id(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "LONGEST_READ", 10 * PART)
    session_id = await opened(store)
    async with instance(store) as one:
        store.down("load")
        exchange = one.client(session_id).open_parts(*long_call(20 * PART))
        assert_unavailable(await exchange.answer())
        assert exchange.unread >= 9


async def test_a_few_long_bodies_are_read_at_a_time_and_few_wait(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MAX_WAITING", 2)
    monkeypatch.setattr(refusals, "READ_TIMEOUT", 60.0)
    session_id = await opened(store)
    async with instance(store) as one:
        store.down("load")
        *parts, last = long_call(10 * PART)
        exchanges = [one.client(session_id).open_parts(*parts, whole=False) for _ in range(10)]
        await until(lambda: sum(exchange.unread == 0 for exchange in exchanges) == refusals.READERS)
        # Those that need not be read are refused meanwhile.
        assert_not_handled(await one.client(session_id).ping())
        await until(lambda: sum(exchange.over.is_set() for exchange in exchanges) == 4)
        assert sum(exchange.unread == 0 for exchange in exchanges) == refusals.READERS
        for exchange in exchanges:
            exchange.arrive(last)
        answers = [await exchange.answer() for exchange in exchanges]
        assert sorted(answer.status for answer in answers) == [200] * 6 + [503] * 4
        for answer in answers:
            (assert_not_handled if answer.status == 200 else assert_unavailable)(answer)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
async def test_a_body_that_exceeds_the_limit_without_saying_so_is_answered_413(
    store: FaultyStore, resident: bool
) -> None:
    session_id = await opened(store)
    async with instance(store, max_request_body_size=2 * PART) as one:
        client = one.client(session_id)
        if resident:
            assert (await client.ping()).status == 200
        exchange = client.open_parts(*long_call(20 * PART))
        answer = await exchange.answer()
        assert (answer.status, answer.session_id) == (413, None)
        assert exchange.unread >= 17
        assert (await client.open_parts(*long_call(2 * PART)).answer()).result == {}
        await one.at_rest()


@pytest.mark.parametrize("content_length", ["131073", "99999999999999999999"])
async def test_a_body_that_says_that_it_exceeds_the_limit_is_not_read(store: FaultyStore, content_length: str) -> None:
    session_id = await opened(store)
    async with instance(store, max_request_body_size=2 * PART) as one:
        store.calls.clear()
        exchange = one.client(session_id).open_parts(*long_call(), content_length=content_length)
        assert (await exchange.answer()).status == 413
        assert exchange.unread == 64
        assert store.calls == []


@pytest.mark.parametrize("modern", [True, False])
async def test_the_limit_holds_outside_of_sessions(store: FaultyStore, modern: bool) -> None:
    async with instance(store, max_request_body_size=2 * PART) as one:
        if modern:
            exchange = one.client(UNKNOWN).open_parts(*long_call(), mcp_protocol_version="2026-07-28")
        else:
            exchange = one.client().open_parts(*long_call())
        assert (await exchange.answer()).status == 413


async def test_a_copy_that_leaves_while_a_long_body_is_read_is_restored(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        session_id = await client.handshake()
        *parts, last = long_call(4 * PART)
        exchange = client.open_parts(*parts, whole=False)
        await until(lambda: exchange.unread == 0)
        await one.terminate(session_id)
        exchange.arrive(last)
        assert (await exchange.answer()).result == {}
        await one.at_rest()


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
@pytest.mark.parametrize("parts", [1, 3])
async def test_a_client_that_goes_within_its_body_leaves_nothing(
    store: FaultyStore, resident: bool, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = await opened(store)
    async with instance(store) as one:
        client = one.client(session_id)
        if resident:
            assert (await client.ping()).status == 200
        caplog.clear()
        exchange = client.open_parts(*long_call(4 * PART)[:parts], whole=False)
        await until(lambda: exchange.unread == 0)
        await exchange.leave()
        assert exchange.sent == []
        assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
        await one.at_rest()
        assert (await client.ping()).status == 200


# A call whose copy leaves memory


@pytest.mark.parametrize("way", ["evicted", "terminated", "crashed"])
async def test_a_call_whose_copy_is_gone_is_lost_and_its_client_learns_it_by_its_id(
    store: FaultyStore, way: str
) -> None:
    async with instance(store, json_response=True) as one:
        client = one.client()
        session_id = await client.handshake()
        # A body with the name of a handshake takes another way.
        calls = [client.open_call("wait", arguments) for arguments in ({}, {"method": "initialize"})]
        await until(lambda: one.notes.waiting == len(calls))
        session = resident_of(one.manager, session_id)
        if way == "evicted":
            await registry_of(one.manager).evict(session)
        elif way == "terminated":
            await one.terminate(session_id)
        else:
            session.loop.cancel()
        for number, call in enumerate(calls, start=2):
            answer = await call.answer()
            assert answer.status == 200
            assert answer.messages[0]["id"] == number
            assert answer.error["data"] == {"reason": "lost"}
            assert "was not handled" not in answer.error["message"]
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
