"""Which bodies may be for other instances, and what the metrics say of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store import ConfigurationError, durable_app
from mcp_session_store.adapter import routing
from mcp_session_store.adapter.relay.messages import ADDRESSED, ROOTS_CHANGED, named_notifications, relayed
from mcp_session_store.mailbox import MessageKind
from tests.support.asgi import until
from tests.support.asking import Asking, roots
from tests.support.instances import Notes, instance
from tests.support.measured import measuring

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyMailbox, FaultyStore

OURS = 5 << 29 | 1
OWN = "notifications/notes/changed"


def notification(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


@pytest.mark.parametrize(
    ("message", "kind", "number"),
    [
        ({"jsonrpc": "2.0", "id": OURS, "result": {}}, MessageKind.ANSWER, 5),
        ({"jsonrpc": "2.0", "id": str(OURS), "result": {}}, MessageKind.ANSWER, 5),
        ({"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": ""}}, MessageKind.ANSWER, None),
        ({"jsonrpc": "2.0", "id": 2**53, "result": {}}, MessageKind.ANSWER, None),
        (notification("notifications/progress", progressToken=OURS, progress=1), MessageKind.PROGRESS, 5),
        (notification("notifications/cancelled", requestId="7"), MessageKind.CANCELLED, None),
        (notification(ROOTS_CHANGED), MessageKind.NOTIFICATION, None),
        (notification(OWN), MessageKind.NOTIFICATION, None),
        ({"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": ""}}, None, None),
        (notification("notifications/progress", progressToken="own", progress=1), None, None),
        (notification("notifications/progress", progressToken=[OURS], progress=1), None, None),
        (notification("notifications/cancelled", requestId=None), None, None),
        (notification("notifications/cancelled", requestId=True), None, None),
        (notification("notifications/initialized"), None, None),
        (notification("notifications/other"), None, None),
        ({"jsonrpc": "2.0", "id": OURS, "method": "tools/call", "params": {"result": 1, "error": 2}}, None, None),
        ({"id": OURS, "result": {}}, None, None),
        ([{"jsonrpc": "2.0", "id": OURS, "result": {}}], None, None),
        ({"jsonrpc": "2.0", "method": {"of": "no text"}, "result": 1}, None, None),
        ("result", None, None),
    ],
)
def test_only_some_messages_are_relayed(message: Any, kind: MessageKind | None, number: int | None) -> None:
    found = relayed(json.dumps(message).encode(), named_notifications([OWN]) | ADDRESSED)
    assert (found.kind if found else None) == kind
    assert (found.number if found else None) == number


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"result":' + b"[" * 100_000, b'{"id": 1e400, "result": {}}'])
def test_what_is_no_json_is_left_to_the_transport(body: bytes) -> None:
    assert relayed(body, frozenset()) is None


@pytest.mark.parametrize(
    "named", ["notes/changed", "notifications/initialized", "notifications/cancelled", "notifications/progress", 7]
)
def test_only_notifications_of_the_applications_own_can_be_named(named: Any) -> None:
    with pytest.raises(ConfigurationError, match="relayed_notifications"):
        named_notifications([named])
    with pytest.raises(ConfigurationError, match="relayed_notifications"):
        durable_app(Notes().server, "sqlite:///unused.db", relayed_notifications=[named])


@pytest.mark.anyio
async def test_calls_are_not_parsed(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr(routing, "relayed", lambda body, _methods: parsed.append(body))
    async with instance(store, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        for each in (client, other.client(await client.begin())):
            assert (await each.call("add", {"a": 1, "b": 2})).text == "3"
            assert (await each.post({"jsonrpc": "2.0", "id": "result", "method": "ping"})).status == 200
    # The notification that ended the handshake, and what has the word anywhere.
    assert [b"notifications/initialized" in body for body in parsed] == [True, False, False]


@pytest.mark.anyio
async def test_a_named_notification_reaches_every_copy_and_any_other_that_of_its_instance_only(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    servers = [Notes(), Notes()]
    named = {"relay": mailbox, "relayed_notifications": [OWN]}
    async with instance(store, servers[0], **named) as one, instance(store, servers[1], **named) as other:
        client = one.client()
        session_id = await client.begin()
        assert (await other.client(session_id).ping()).status == 200
        assert (await client.notify("notifications/notes/other")).status == 202
        assert (await client.notify(OWN, {"name": "x"})).status == 202
        await until(lambda: len(servers[1].genuine(OWN)) == 1)
        (seen,) = servers[1].genuine(OWN)
        # It is restored there, and nothing is known of the request.
        assert seen.params == {"name": "x"}
        assert seen.marker is not None
        assert seen.request.headers["mcp-session-id"] == session_id
        await anyio.wait_all_tasks_blocked()
        assert len(servers[0].genuine(OWN)) == 1
        assert servers[1].genuine("notifications/notes/other") == []


@pytest.mark.anyio
async def test_messages_are_counted_by_kind_and_reason(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    measured = measuring()
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        elsewhere = other.client(await client.begin())
        measured.read()
        call = client.open_call("ask")
        question = (await call.next())["id"]
        assert (await elsewhere.respond(question, roots("x"))).status == 202
        await call.end()
        found = measured.read()
        answer = {"kind": "answer", "mcp_session_store.namespace": "default"}
        for name in ("messages.sent", "messages.delivered", "message.delivery.duration"):
            (point,) = found[f"mcp_session_store.{name}"]
            assert (point.value, point.attributes) == (1, answer)
        for dropped, reason in ((question, "unknown question"), (1, "no copy"), (2**52 + 7, "instance gone")):
            assert (await elsewhere.respond(dropped, roots("x"))).status == 202
            expected = {(("kind", "answer"), ("reason", reason)): 1}
            await measured.reach("mcp_session_store.messages.dropped", expected)


@pytest.mark.anyio
async def test_messages_to_an_instance_that_is_gone_are_logged_once(
    store: FaultyStore, mailbox: FaultyMailbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mcp_session_store.sessions")
    async with instance(store, relay=mailbox) as one:
        client = one.client()
        await client.begin()
        for question in (OURS, OURS + 1, 6 << 29 | 1):
            assert (await client.respond(question, roots("x"))).status == 202
        lines = [record.getMessage() for record in caplog.records if "has stopped or died" in record.getMessage()]
        assert len(lines) == 2
