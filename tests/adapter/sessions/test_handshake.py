"""Opening a session: its id reaches the client when its record is committed, and otherwise nothing stays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.server import streamable_http_manager
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from sse_starlette import EventSourceResponse

from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS, Answer, assert_unavailable
from tests.support.instances import Notes, instance, wait_for
from tests.support.internals import stopping_in

if TYPE_CHECKING:
    from mcp.server.context import HandlerResult

    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance, RequestContext

pytestmark = pytest.mark.anyio

INITIALIZE: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": INITIALIZE_PARAMS}


def assert_nothing_stays(one: Instance) -> None:
    assert one.residents == 0
    assert stopping_in(one.manager) == {}
    one.assert_seats_match()


async def test_nothing_of_the_answer_leaves_before_the_record_is_committed(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, json_response=json_response) as one:
        commit = store.hold("create")
        opening = one.client().open_initialize()
        await commit.wait_entered()
        await anyio.wait_all_tasks_blocked()
        assert opening.sent == []
        commit.release()
        answer = await opening.answer()
        assert answer.status == 200
        assert answer.session_id is not None
        assert answer.result["serverInfo"]["name"] == "notes"
        assert await store.record(answer.session_id) is not None


async def test_nothing_of_the_answer_leaves_before_the_store_has_said_so(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, json_response=json_response) as one:
        commit = store.hold("create", after=True)
        opening = one.client().open_initialize()
        await commit.wait_entered()
        await anyio.wait_all_tasks_blocked()
        assert opening.sent == []
        commit.release()
        assert (await opening.answer()).status == 200


async def test_a_ping_of_an_event_stream_does_not_overtake_the_header(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventSourceResponse, "DEFAULT_PING_INTERVAL", 0.01)
    async with instance(store) as one:
        commit = store.hold("create")
        opening = one.client().open_initialize()
        await commit.wait_entered()
        await anyio.sleep(0.05)  # several pings
        assert opening.sent == []
        commit.release()
        assert (await opening.answer()).status == 200
        assert opening.sent[0]["type"] == "http.response.start"


async def test_a_session_cannot_be_used_before_its_record_is_committed(store: FaultyStore) -> None:
    async with instance(store) as one:
        commit = store.hold("create")
        opening = one.client().open_initialize()
        await commit.wait_entered()
        assert one.residents == 0
        commit.release()
        assert (await opening.answer()).status == 200
        assert one.residents == 1


async def test_a_handshake_that_cannot_be_stored_is_answered_503_without_an_id(
    store: FaultyStore, json_response: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store, json_response=json_response) as one:
        store.down("create")
        client = one.client()
        assert_unavailable(await client.initialize())
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)
        assert [entry for entry in caplog.records if entry.name.startswith("mcp_session_store")], "it is not silent"
        store.up()
        await client.handshake()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_a_commit_whose_outcome_is_unknown_is_answered_503_without_an_id(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, json_response=json_response) as one:
        store.lose_the_answer_of("create")
        assert_unavailable(await one.client().initialize())
        assert store.records == 1
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)


async def test_a_bug_while_a_handshake_is_stored_is_answered_503(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, json_response=json_response) as one:
        store.broken("create")
        assert_unavailable(await one.client().initialize())
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)


async def refuse(_ctx: RequestContext) -> None:
    raise MCPError(code=-32001, message="not you")


async def refuse_by_value(_ctx: RequestContext, _result: HandlerResult) -> Any:
    # The SDK turns an ErrorData that a middleware returns into a JSON-RPC error.
    return types.ErrorData(code=-32001, message="not you")


async def refuse_afterwards(_ctx: RequestContext, _result: HandlerResult) -> HandlerResult:
    raise MCPError(code=-32001, message="not you")


@pytest.mark.parametrize("way", ["before", "by value", "afterwards"])
async def test_a_handshake_that_a_middleware_refuses_opens_nothing(
    store: FaultyStore, json_response: bool, way: str
) -> None:
    notes = Notes()
    if way == "before":
        notes.on_initialize = refuse
    else:
        notes.after_initialize = refuse_by_value if way == "by value" else refuse_afterwards
    async with instance(store, notes, json_response=json_response) as one:
        answer = await one.client().initialize()
        assert answer.status == 200
        assert answer.error["code"] == -32001
        assert answer.session_id is None
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)
        assert store.records == 0


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(json.dumps({**INITIALIZE, "params": {"protocolVersion": "2025-11-25"}}), id="params missing"),
        pytest.param(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize"}), id="no params"),
        pytest.param(json.dumps({**INITIALIZE, "params": {**INITIALIZE_PARAMS, "x": float("nan")}}), id="NaN"),
        pytest.param(json.dumps({**INITIALIZE, "params": {**INITIALIZE_PARAMS, "x": [float("-inf")]}}), id="infinity"),
        pytest.param(
            json.dumps({**INITIALIZE, "params": {**INITIALIZE_PARAMS, "x": "0"}}).replace('"0"', "1e999"), id="1e999"
        ),
        pytest.param(json.dumps({**INITIALIZE, "params": {**INITIALIZE_PARAMS, "x": "y" * 70_000}}), id="too large"),
    ],
)
async def test_params_that_cannot_be_stored_are_refused_and_open_nothing(
    store: FaultyStore, json_response: bool, body: str
) -> None:
    async with instance(store, json_response=json_response) as one:
        answer = await one.client().post(body.encode())
        assert answer.status == 200
        assert answer.error["code"] == types.INVALID_PARAMS
        assert answer.session_id is None
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)
        assert store.records == 0


async def test_how_large_the_params_may_be_is_configured(store: FaultyStore) -> None:
    size = len(json.dumps(INITIALIZE_PARAMS, separators=(",", ":")))
    async with instance(store, max_initialize_params=size) as one:
        assert (await one.client().initialize()).session_id is not None
    async with instance(store, max_initialize_params=size - 1) as one:
        answer = await one.client().initialize()
        assert answer.session_id is None
        assert str(size) in answer.error["message"]
        assert str(size - 1) in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "message", "headers"),
    [
        pytest.param("POST", b"{", {}, id="no JSON"),
        pytest.param("POST", {"jsonrpc": "2.0", "id": 1, "method": "ping"}, {}, id="no initialize"),
        pytest.param("POST", {"jsonrpc": "2.0", "method": "initialize"}, {}, id="a notification"),
        pytest.param("POST", {"jsonrpc": "2.0", "id": 1, "result": {}}, {}, id="an answer"),
        pytest.param("POST", INITIALIZE, {"accept": "image/png"}, id="not acceptable"),
        pytest.param("POST", INITIALIZE, {"content_type": "text/plain"}, id="not JSON"),
        pytest.param("POST", INITIALIZE, {"host": "evil.example"}, id="wrong host"),
        pytest.param("GET", None, {}, id="GET"),
        pytest.param("DELETE", None, {}, id="DELETE"),
        pytest.param("PUT", INITIALIZE, {}, id="PUT"),
    ],
)
async def test_an_opening_request_that_is_refused_carries_no_id(
    store: FaultyStore, json_response: bool, method: str, message: Any, headers: dict[str, str]
) -> None:
    guard = TransportSecuritySettings(allowed_hosts=["127.0.0.1:*"])
    async with instance(store, json_response=json_response, transport_security=guard) as one:
        answer = await one.client().open(method, message, **headers).answer()
        assert 400 <= answer.status < 500
        assert answer.session_id is None
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)
        assert store.counts()["create"] == 0


async def test_a_client_that_leaves_before_the_commit_leaves_nothing_behind(
    store: FaultyStore, json_response: bool
) -> None:
    notes = Notes()
    entered = anyio.Event()

    async def never(_ctx: RequestContext) -> None:
        entered.set()
        await anyio.sleep_forever()

    notes.on_initialize = never
    async with instance(store, notes, json_response=json_response) as one:
        opening = one.client().open_initialize()
        await wait_for(entered)
        opening.cancel()
        await opening.end()
        assert opening.sent == []
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)
        assert store.records == 0


async def test_a_client_that_leaves_during_the_commit_leaves_no_copy(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, json_response=json_response) as one:
        commit = store.hold("create", after=True)
        opening = one.client().open_initialize()
        await commit.wait_entered()
        opening.cancel()
        await opening.end()
        assert opening.sent == []
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)


async def test_the_end_of_an_event_stream_during_the_commit_leaves_no_copy(store: FaultyStore) -> None:
    # No cancellation by the ASGI server: the SSE response notices that its client has gone.
    async with instance(store, json_response=False) as one:
        commit = store.hold("create")
        opening = one.client().open_initialize()
        await commit.wait_entered()
        opening.disconnect()
        await opening.end()
        assert opening.sent == []
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)
        assert store.records == 0


async def test_a_server_loop_that_cannot_start_is_answered_503(
    store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    async with instance(store, json_response=json_response) as one:
        monkeypatch.setattr(streamable_http_manager, "serve_loop", broken)
        assert_unavailable(await one.client().initialize())
        await until(lambda: not stopping_in(one.manager))
        assert_nothing_stays(one)


async def test_what_a_client_calls_itself_is_shown_without_control_characters(store: FaultyStore) -> None:
    info = {"name": "\x1b[31mevil\u202e\r\nname", "version": "1\x00.\x7f0"}
    async with instance(store) as one:
        client = one.client()
        session_id = await client.handshake({**INITIALIZE_PARAMS, "clientInfo": info})
        record = await store.record(session_id)
        assert record is not None
        assert record.client_name == "[31mevilname"
        assert record.client_version == "1.0"
        assert json.loads(record.initialize_params)["clientInfo"] == info


async def test_the_negotiated_version_is_stored(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        answer = await client.initialize({**INITIALIZE_PARAMS, "protocolVersion": "2025-03-26"})
        assert client.session_id is not None
        record = await store.record(client.session_id)
        assert record is not None
        assert record.protocol_version == answer.result["protocolVersion"] == "2025-03-26"
        unknown = await one.client().initialize({**INITIALIZE_PARAMS, "protocolVersion": "1999-01-01"})
        assert unknown.session_id is not None
        record = await store.record(unknown.session_id)
        assert record is not None
        assert record.protocol_version == unknown.result["protocolVersion"] != "1999-01-01"


async def test_the_instance_that_opened_a_session_is_its_hint(store: FaultyStore) -> None:
    async with instance(store) as one:
        record = await store.record(await one.client().handshake())
        assert record is not None
        assert record.instance_hint == one.manager.instance


# A second initialize, within a session


OTHER_PARAMS = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"roots": {"listChanged": True}},
    "clientInfo": {"name": "other", "version": "2"},
}


async def declared(answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(answer.text)
    return told


async def test_a_second_initialize_is_durable_before_its_answer(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, json_response=json_response) as one, instance(other_store) as two:
        client = one.client()
        session_id = await client.handshake()
        commit = store.hold("replace_initialize")
        again = client.open_initialize(OTHER_PARAMS)
        await commit.wait_entered()
        await anyio.wait_all_tasks_blocked()
        assert again.sent == []
        commit.release()
        answer = await again.answer()
        assert answer.status == 200
        assert answer.session_id == session_id
        assert answer.result["protocolVersion"] == "2025-06-18"
        record = await store.record(session_id)
        assert record is not None
        assert json.loads(record.initialize_params) == OTHER_PARAMS
        assert (record.protocol_version, record.client_name, record.client_version) == ("2025-06-18", "other", "2")
        assert record.revision == 1
        restored = await declared(await two.client(session_id).call("client"))
        assert restored["params"] == OTHER_PARAMS


@pytest.mark.parametrize("fault", ["down", "bug"])
async def test_a_second_initialize_that_cannot_be_stored_changes_nothing(
    store: FaultyStore, json_response: bool, fault: str
) -> None:
    async with instance(store, json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        before = await declared(await client.call("client"))
        record = await store.record(session_id)
        if fault == "down":
            store.down()
        else:
            store.broken()
        answer = await client.initialize(OTHER_PARAMS)
        assert answer.status == 503
        assert "retry-after" in answer.headers
        store.up()
        assert await declared(await client.call("client")) == before
        after = await store.record(session_id)
        assert record is not None
        assert after is not None
        assert (after.initialize_params, after.protocol_version, after.revision) == (
            record.initialize_params,
            record.protocol_version,
            record.revision,
        )


@pytest.mark.parametrize("way", ["before", "by value", "afterwards"])
async def test_a_second_initialize_that_a_middleware_refuses_changes_nothing(
    store: FaultyStore, other_store: FaultyStore, json_response: bool, way: str
) -> None:
    notes = Notes()
    async with instance(store, notes, json_response=json_response) as one, instance(other_store) as two:
        client = one.client()
        session_id = await client.handshake()
        if way == "before":
            notes.on_initialize = refuse
        else:
            notes.after_initialize = refuse_by_value if way == "by value" else refuse_afterwards
        answer = await client.initialize(OTHER_PARAMS)
        assert answer.error["code"] == -32001
        assert store.counts()["replace_initialize"] == 0
        assert (await declared(await client.call("client")))["params"] == INITIALIZE_PARAMS
        assert (await declared(await two.client(session_id).call("client")))["params"] == INITIALIZE_PARAMS


async def test_a_second_initialize_with_params_that_cannot_be_stored_changes_nothing(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        answer = await client.initialize({**OTHER_PARAMS, "x": float("nan")})
        assert answer.error["code"] == types.INVALID_PARAMS
        assert (await declared(await client.call("client")))["params"] == INITIALIZE_PARAMS
        assert store.counts()["replace_initialize"] == 0


async def test_a_second_initialize_in_a_session_that_ended_elsewhere_is_answered_404(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, json_response=json_response) as one, instance(other_store) as two:
        client = one.client()
        session_id = await client.handshake()
        assert (await two.client(session_id).delete()).status == 200
        assert (await client.initialize(OTHER_PARAMS)).status == 404
        await until(lambda: one.residents == 0)


async def test_the_initialized_that_follows_a_second_initialize_is_handled_in_a_restored_session_too(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with instance(store) as one, instance(other_store) as two:
        session_id = await one.client().handshake()
        client = two.client(session_id)
        assert (await client.initialize(OTHER_PARAMS)).status == 200
        assert (await client.notify("notifications/initialized")).status == 202
        await until(lambda: len(two.notes.initialized) == 2)
        assert [marker is not None and marker.replaying for marker in two.notes.initialized] == [True, False]


async def test_a_call_that_only_mentions_initialize_is_a_call(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        store.down()
        answer = await client.call("add", {"a": "initialize", "b": ""})
        assert answer.text == "initialize"
        assert (await client.respond("initialize", {})).status == 202
