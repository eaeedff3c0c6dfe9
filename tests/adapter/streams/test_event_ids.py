"""Event ids: opaque, unique in their session, the place to go on from, and of no use in another session."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

from mcp_session_store import session_key
from mcp_session_store.adapter.streams.event_ids import Cursor, EventIds, fits
from mcp_session_store.event_log import STANDALONE_STREAM
from tests.support.asgi import seen_by_a_client, until
from tests.support.faulty_stores import FaultyLog
from tests.support.instances import instance, principal
from tests.support.internals import tag_of
from tests.support.streams import opened
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.http import Answer
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

ODD_IDS: list[str | int] = [
    0,
    -1,
    2**53,
    "1",
    "",
    "-0",
    "007",
    "1.0",
    "a/b//c/!/",
    '"quoted" \\ "initialize"',
    " \t\r\n\0",
    "é",
    "日本語🦜",
    "9d6b3c1e-4c0e-4f6e-9d8e-1f2a3b4c5d6e",
    "_GET_stream*",
]
LONG_IDS: list[str | int] = [10**100, "x" * 99, "日" * 98, "🦜" * 60, "x" * 5000]
"""Such as do not fit into an event id."""


async def heard(client: Client, talking: Talking, *texts: str, request_id: str | int | None = None) -> list[str]:
    """The event ids of a call that says this, and is answered."""
    call, exchange = await talking.call(client, request_id=request_id)
    await call.say(*texts)
    call.answer()
    await exchange.end()
    return ids_of(exchange)


def ids_of(exchange: Exchange) -> list[str]:
    ids = [event.id for event in exchange.events]
    assert all(ids), "an event without an id"
    return [id_ for id_ in ids if id_]


async def refusal(client: Client, last_event_id: str) -> Answer:
    return await client.open_stream(last_event_id).answer()


async def test_no_two_events_of_a_session_have_the_same_id(talking: Talking, client: Client) -> None:
    stream = await opened(client)
    ids: list[str] = []
    # Clients use an id again, and write it in two ways.
    for request_id in (1, 1, "1", 1):
        call, exchange = await talking.call(client, request_id=request_id)
        await call.tell("to all")
        await call.say("a", "b")
        call.answer()
        await exchange.end()
        ids += ids_of(exchange)
        assert len(ids_of(exchange)) == 4
    await hears(stream, *["to all"] * 4)
    ids += ids_of(stream)
    assert len(ids) == len(set(ids)) == 4 * 4 + 1 + 4


async def test_each_id_leads_on_in_its_own_call_whatever_id_the_client_gave_it(
    talking: Talking, client: Client
) -> None:
    first = await heard(client, talking, "first", request_id=1)
    second = await heard(client, talking, "second", request_id=1)
    third = await heard(client, talking, "third", request_id="1")
    for ids, text, request_id in ((first, "first", 1), (second, "second", 1), (third, "third", "1")):
        resumed = client.open_stream(ids[0])
        await resumed.end()
        assert told(resumed.messages) == [text, "done"]
        assert resumed.messages[-1]["id"] == request_id
        assert type(resumed.messages[-1]["id"]) is type(request_id)
        assert ids_of(resumed) == ids[1:]


async def test_ids_stay_unique_over_restores_and_on_two_instances_at_once(store: FaultyStore, log: FaultyLog) -> None:
    ids: list[str] = []
    last_event_id: str | None = None
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        ids += await heard(client, talking, "a", request_id=1)
    for _ in range(3):
        mine, others = Talking(), Talking()
        other_store = type(store)(store.inner)
        async with (
            instance(store, mine.notes, events=log) as one,
            instance(other_store, others.notes, events=FaultyLog(other_store)) as two,
        ):
            client, elsewhere = one.client(session_id), two.client(session_id)
            stream = client.open_stream(last_event_id)
            for _ in range(2):
                call, exchange = await mine.call(client, request_id=1)
                other_call, other_exchange = await others.call(elsewhere, request_id=1)
                for talks in (call, other_call):
                    await talks.say("b")
                    await talks.tell("to all")
                    talks.answer()
                await exchange.end()
                await other_exchange.end()
                ids += ids_of(exchange) + ids_of(other_exchange)
            await hears(stream, *["to all"] * 4)
            ids += ids_of(stream)
            last_event_id = stream.last_event_id
    assert len(ids) == len(set(ids)) == 3 + 1 + 3 * (2 * 2 * 3 + 4)


async def test_an_id_is_opaque_and_fits_into_a_header(talking: Talking, one: Instance) -> None:
    client = one.client(user=principal("alice"))
    session_id = await client.handshake()
    for request_id in ODD_IDS:
        for event_id in await heard(client, talking, "secret", request_id=request_id):
            assert event_id.isascii()
            assert all(c.isalnum() or c in "-_" for c in event_id)
            raw = base64.urlsafe_b64decode(event_id + "==")
            for told_to_nobody in (session_id.encode(), session_key(session_id).bytes, b"secret", b"alice"):
                assert told_to_nobody not in raw
                assert told_to_nobody not in event_id.encode()


@pytest.mark.parametrize("request_id", ODD_IDS, ids=range(len(ODD_IDS)))
async def test_a_call_can_be_resumed_whatever_id_the_client_gives_it(
    request_id: str | int, talking: Talking, client: Client
) -> None:
    call, exchange = await talking.call(client, request_id=request_id)
    await call.say("a")
    await hears(exchange, "a")
    resumed = client.open_stream(await exchange.leave())
    await resumed.start()
    assert resumed.status == 200
    call.answer()
    await resumed.end()
    assert told(resumed.messages) == ["done"]
    assert resumed.messages[0]["id"] == request_id
    assert (await client.open_stream(resumed.last_event_id).answer()).status == 405


@pytest.mark.parametrize("request_id", ODD_IDS, ids=range(len(ODD_IDS)))
async def test_an_error_that_ends_a_call_names_it_as_the_client_did(
    log: FaultyLog, request_id: str | int, talking: Talking, client: Client
) -> None:
    session_id = str(client.session_id)
    ids = await heard(client, talking, "a", request_id=request_id)
    log.lose(session_id)
    resumed = await client.open_stream(ids[1]).answer()
    assert told(resumed.messages) == ["trimmed"]
    assert resumed.messages[0]["id"] == request_id
    assert type(resumed.messages[0]["id"]) is type(request_id)


@pytest.mark.parametrize("request_id", LONG_IDS, ids=range(len(LONG_IDS)))
async def test_a_call_whose_id_does_not_fit_is_answered_and_gets_no_ids(
    log: FaultyLog, request_id: str | int, talking: Talking, client: Client
) -> None:
    session_id = str(client.session_id)
    call, exchange = await talking.call(client, request_id=request_id)
    await call.say("a")
    # Who was given no id would not come back.
    await call.close()
    await call.say("b")
    call.answer()
    await exchange.end()
    assert told(exchange.messages) == ["a", "b", "done"]
    assert exchange.messages[-1]["id"] == request_id
    assert {event.id for event in exchange.events} == {None}
    assert log.stored(session_id) == []


async def test_sessions_that_use_the_same_ids_each_resume_their_own_streams(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    texts = [str(n) for n in range(8)]
    async with instance(store, talking.notes, events=log) as one:
        sessions = []
        for number in range(3):
            client = one.client()
            await client.handshake()
            stream = client.open_stream()
            await until(lambda stream=stream: stream.last_event_id is not None)  # type: ignore[misc]
            call, exchange = await talking.call(client, request_id=7)
            await until(lambda exchange=exchange: exchange.last_event_id is not None)  # type: ignore[misc]
            left = str(await stream.leave()), str(await exchange.leave())
            sessions.append((client, call, [f"{number}: {text}" for text in texts], left))
        for place in range(len(texts)):
            for _, call, own_texts, _ in sessions:
                await call.say(own_texts[place])
                await call.tell(f"to all: {own_texts[place]}")
        for client, call, own_texts, (standalone, own) in sessions:
            await hears(client.open_stream(standalone), *(f"to all: {text}" for text in own_texts))
            resumed = client.open_stream(own)
            await hears(resumed, *own_texts)
            call.answer(f"answer to {own_texts[0]}")
            await resumed.end()
            assert told(resumed.messages) == [*own_texts, f"answer to {own_texts[0]}"]


# Ids that are none of this session's


async def bad_ids(client: Client, other: Client, talking: Talking) -> dict[str, str]:
    """Event ids that this client was never given, though the other one was."""
    mine = await heard(client, talking, "mine")
    theirs = await heard(other, talking, "theirs", request_id=client._last_id)
    stream = other.open_stream()
    await until(lambda: stream.last_event_id is not None)
    standalone = str(await stream.leave())
    forged = {
        f"forged {n}": _forged(client.session_id, payload)
        for n, payload in enumerate(
            (
                b"",
                b"/",
                b"1/1",
                b"x/1/stream/",
                b"1/1/*//[1]",
                b"1/1/*//{",
                b"1/1/*//1.5",
                b"1/1/*//true",
                b"1/1/12345678.1/",
                b"1/1/12345678.1//null",
                b"1/1/12345678.1//true",
                b"1/1/12345678.1//1.5",
                b"1/1/12345678.1//[1]",
                b"1/1/12345678.1//\xed\xa0\x80",
                b"\xff/1/*/",
                b"-1/1/*/",
                b"1/-1/*/",
                b"f" * 17 + b"/1/*/",
                b"1/" + b"f" * 17 + b"/*/",
                b"1/1/\0/",
                b"1/1/\0//1",
                b"1/1/\xed\xa0\x80//1",
                # A name that no instance has: it would be asked for together with those of all others.
                b"1/1/\0.1//1",
                b"1/1/1234567\0.1//1",
                b"1/1/1234567\xed\xa0\x80.1//1",
                b"1/1/12345678\n.1//1",
                b"1/1/one.1//1",
                b"1/1/.1//1",
                b"1/1/123456789.1//1",
                b"1/1/1234567G.1//1",
                b"1/1/12345678//1",
                b"1/1/12345678.//1",
                b"1/1/12345678.1.1//1",
                b"1/1/12345678.01//1",
                b"1/1/12345678.A//1",
                # A request id that no JSON-RPC error can name.
                b'1/1/12345678.1//"\xed\xa0\x80"',
                b'1/1/12345678.1//"\\ud800"',
                b'1/1/12345678.1//"' + b"x" * 100 + b'"',
                b"1/1/12345678.1//NaN",
                # Written otherwise.
                b"01/1/12345678.1//1",
                b"+1/1/12345678.1//1",
                b"0x1/1/12345678.1//1",
                b"1_0/1/12345678.1//1",
                b" 1/1/12345678.1//1",
                b"A/1/12345678.1//1",
                b"1/1/12345678.1// 1",
                b"1/1/12345678.1//-0",
                b'1/1/12345678.1//"\\u0061"',
                b"1/1/12345678.1/?/1",
                b"1/1/12345678.1/!!/1",
                b"1/1/*/!",
                b"0/1/*/",
            )
        )
    }
    return {
        "another session's": theirs[0],
        "another session's, of an answer": theirs[-1],
        "another session's standalone": standalone,
        "malformed": "no event id",
        "a number": "1",
        "another store's": "_GET_stream/1",
        "a star": "*",
        "padding": "====",
        "another tag": ("B" if mine[1][0] == "A" else "A") + mine[1][1:],
        "another payload": mine[1][:-1] + ("A" if mine[1][-1] != "A" else "B"),
        "longer": mine[1] + "AAAA",
        "padded": mine[1] + "=" * (-len(mine[1]) % 4 or 4),
        "twice": mine[1] * 2,
        "not ASCII": "é日🦜" + mine[1],
        "10 kB": mine[1] + "A" * 10_000,
        "10 kB of padding": mine[1] + "=" * 10_000,
        **{f"the first {n}": mine[1][:n] for n in range(1, len(mine[1]))},
        **forged,
    }


def _forged(session_id: str | None, payload: bytes) -> str:
    """What has the tag of an id of this session, and was written by no server."""
    ids = EventIds(session_key(str(session_id)))
    return base64.urlsafe_b64encode(tag_of(ids, payload) + payload).decode().rstrip("=")


async def test_an_id_that_the_session_was_not_given_gets_the_same_400_always_and_costs_no_query(
    store: FaultyStore, log: FaultyLog, talking: Talking, one: Instance
) -> None:
    client, other = one.client(), one.client()
    await client.handshake()
    await other.handshake()
    bad = await bad_ids(client, other, talking)
    await until(lambda: store.touches != [])
    expected = seen_by_a_client(await refusal(client, bad["malformed"]))
    assert expected[0] == 400
    store.calls.clear()
    log.calls.clear()
    for name, last_event_id in bad.items():
        assert seen_by_a_client(await refusal(client, last_event_id)) == expected, name
    assert set(store.calls) <= {"touch"}
    assert log.calls == []
    assert (await client.ping()).status == 200


async def test_an_id_that_the_session_was_not_given_closes_no_stream(talking: Talking, one: Instance) -> None:
    client, other = one.client(), one.client()
    await client.handshake()
    await other.handshake()
    bad = await bad_ids(client, other, talking)
    stream = client.open_stream()
    call, exchange = await talking.call(client)
    their_call, their_exchange = await talking.call(other)
    await until(lambda: their_exchange.last_event_id is not None)
    bad["another session's, of a call that runs"] = str(their_exchange.last_event_id)
    for last_event_id in bad.values():
        assert (await refusal(client, last_event_id)).status == 400
    await call.say("a")
    await call.tell("b")
    await hears(exchange, "a")
    await hears(stream, "b")
    await their_call.say("c")
    await hears(their_exchange, "c")


async def test_an_empty_id_is_none(store: FaultyStore, log: FaultyLog) -> None:
    async with instance(store, events=log) as one:
        client = one.client()
        await client.handshake()
        stream = client.open_stream("")
        await stream.start()
        assert stream.status == 200
        await until(lambda: stream.last_event_id is not None)


# The format


@pytest.mark.parametrize("request_id", [*ODD_IDS, None], ids=range(len(ODD_IDS) + 1))
@pytest.mark.parametrize("final", [False, True])
def test_an_id_that_was_written_is_read_as_it_was(request_id: str | int | None, final: bool) -> None:
    ids = EventIds(session_key("a session"))
    stream = STANDALONE_STREAM if request_id is None else "01234567.ffffffff"
    if request_id is None:
        final = False  # it has no answer
    cursor = Cursor(stream=stream, sequence=2**62 - 1, position=2**63 - 1, request_id=request_id, final=final)
    written = ids.write(*cursor)
    read = ids.read(written)
    assert read == cursor
    assert type(read.request_id) is type(request_id)
    assert len(written) < 400
    assert EventIds(session_key("another session")).read(written) is None
    assert request_id is None or fits(request_id)


@pytest.mark.parametrize(("sequence", "position"), [(2**62, 0), (-1, 0), (0, 2**63), (0, -1)])
def test_an_id_of_a_place_that_no_event_can_have_is_not_read(sequence: int, position: int) -> None:
    ids = EventIds(session_key("a session"))
    assert ids.read(ids.write("01234567.1", sequence, position, 1)) is None


@pytest.mark.parametrize("request_id", LONG_IDS, ids=range(len(LONG_IDS)))
def test_an_id_that_does_not_fit_is_told(request_id: str | int) -> None:
    assert not fits(request_id)


def test_an_id_with_a_lone_surrogate_does_not_fit() -> None:
    assert not fits("\ud800")


# Written by the version before


@pytest.mark.parametrize(
    ("event_id", "cursor"),
    [
        ("Vi6DHUs3MWYvMi8wMTIzNDU2Ny5hLy83", Cursor("01234567.a", 31, 2, 7)),
        ("oBz0LrV5MC8wLzAxMjM0NTY3LjEvLyLDqS8xIg", Cursor("01234567.1", 0, 0, "é/1")),
        ("JckWgBTHMTAwMC8xMS8wMTIzNDU2Ny5mZi8hLyJhIFwiYlwiIg", Cursor("01234567.ff", 4096, 17, 'a "b"', final=True)),
        ("T8FenmU5MS8yMDAwMDAwMDAwMDAwMDAwLyov", Cursor(STANDALONE_STREAM, 1, 2**61)),
    ],
)
def test_an_id_that_an_earlier_version_wrote_is_read(event_id: str, cursor: Cursor) -> None:
    assert EventIds(session_key("a session")).read(event_id) == cursor
