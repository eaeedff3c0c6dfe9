"""Our own failures: what the client gets, and logs that hold neither session ids nor payload."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.server.streamable_http import StreamableHTTPServerTransport
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher

from mcp_session_store import (
    RestoreRefused,
    RetentionPolicy,
    SessionRecord,
    SessionRestoreMarker,
    StoreUnavailable,
    session_key,
)
from mcp_session_store.adapter.sweeping import sweep_events
from mcp_session_store.errors import EventTooLarge
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS, assert_not_handled, assert_unavailable
from tests.support.instances import Notes, instance, principal
from tests.support.internals import instances_of, registry_of, resident_of, stopping_in, transports_in
from tests.support.streams import all_stored, opened
from tests.support.talking import Talking

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import RequestContext

pytestmark = pytest.mark.anyio

PAYLOAD = "xyzzy-payload"
KEY = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""What a session's key looks like."""
PARAMS = {
    **INITIALIZE_PARAMS,
    # Its name and version are logged, as what it is.
    "clientInfo": {"name": "client", "version": "1"},
    "_meta": {"secret": f"{PAYLOAD}-meta"},
}


@pytest.mark.parametrize("operation", ["create", "load", "claim", "end", "replace_initialize"])
async def test_our_own_bug_is_never_answered_500(
    store: FaultyStore, json_response: bool, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    store.claims_first = operation == "claim"
    async with instance(store, json_response=json_response) as one:
        resident = one.client()
        await resident.handshake()
        store.broken(operation)
        if operation == "create":
            exchange = one.client().open_initialize()
        elif operation == "replace_initialize":
            exchange = resident.open_initialize()
        elif operation == "end":
            exchange = resident.open("DELETE")
        else:
            exchange = one.client(session_id).open_request("ping")
        answer = await exchange.answer()
        if operation in ("load", "claim"):
            assert_not_handled(answer)
        else:
            assert_unavailable(answer)
        assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
        store.up()
        assert (await resident.ping()).status == 200
        assert (await one.client(session_id).ping()).status == 200


async def test_logs_hold_neither_session_ids_nor_payload(
    store: FaultyStore, json_response: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, logger="mcp_session_store")
    ids: list[str] = []
    fate = ["nothing"]

    async def on_restore(_marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        if fate[0] == "refuse":
            raise RestoreRefused("no")
        if fate[0] == "bug":
            raise RuntimeError("the application's bug")

    async def on_end(*_: Any) -> None:
        raise RuntimeError("the application's bug")

    notes = Notes()

    async def replay_differently(_ctx: RequestContext) -> None:
        if fate[0] == "replay":
            raise RuntimeError("the application's bug")
        if fate[0] == "hang":
            await anyio.sleep_forever()

    notes.on_initialize = replay_differently
    alice = principal(f"{PAYLOAD}-client", subject=f"{PAYLOAD}-subject")
    async with instance(
        store,
        notes,
        json_response=json_response,
        on_restore=on_restore,
        on_end=on_end,
        replay_timeout=0.05,
        max_sessions=4,
    ) as one:
        for fault in ("down", "broken"):
            for operation in ("create", "load", "claim", "touch", "end", "replace_initialize"):
                client = one.client(user=alice)
                ids.append(await client.handshake(PARAMS))
                getattr(store, fault)(operation)
                await client.call("add", {"a": PAYLOAD, "b": ""})
                await client.initialize(PARAMS)
                await client.delete()
                await one.client(user=alice).initialize(PARAMS)
                await one.client(ids[-1], user=principal("mallory")).ping()
                if ids[-1] in transports_in(one.manager):
                    await one.terminate(ids[-1])
                await client.ping()
                store.up()
                for fate[0] in ("bug", "replay", "hang", "refuse", "nothing"):
                    await until(lambda: not stopping_in(one.manager))
                    if ids[-1] in transports_in(one.manager):
                        await one.terminate(ids[-1])
                    await client.ping()
                for session in list(registry_of(one.manager)):
                    ids.append(session.session_id)
                    await one.client(session.session_id, user=session.owner and alice).delete()
        for _ in range(6):
            client = one.client(user=alice)
            if (await client.initialize(PARAMS)).status == 200:
                await client.get_stream()
        ids += list(transports_in(one.manager))
    ours = [record for record in caplog.records if record.name.startswith("mcp_session_store")]
    assert len({record.getMessage() for record in ours}) >= 8, "the scenario reaches most of what is logged"
    formatter = logging.Formatter("%(message)s")
    for record in ours:
        text = formatter.format(record)
        assert PAYLOAD not in text
        for session_id in ids:
            assert session_id not in text


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that this package has logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("mcp_session_store")]


@pytest.mark.parametrize(("fault", "reason"), [("down", "for now"), ("broken", "unexpected error")])
@pytest.mark.parametrize("operation", ["load", "claim", "replace_initialize", "write_journal", "end"])
async def test_a_request_that_the_store_refuses_is_logged_with_its_sessions_key(
    store: FaultyStore, operation: str, fault: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store) as one:
        session_id = await one.client().handshake()
    store.claims_first = operation == "claim"
    notes = Notes()

    async def handle(_ctx: RequestContext, _params: Any) -> types.EmptyResult:
        return types.EmptyResult()

    notes.server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, handle)
    async with instance(store, notes) as one:
        client = one.client(session_id)
        if operation not in ("load", "claim"):
            await client.ping()
        getattr(store, fault)(operation)
        if operation == "replace_initialize":
            await client.initialize()
        elif operation == "write_journal":
            await client.request("logging/setLevel", {"level": "debug"})
        elif operation == "end":
            await client.delete()
        else:
            await client.ping()
        key = session_key(session_id)
        assert any(f"the session {key} is refused" in text and reason in text for text in logged(caplog)) or (
            # What is unexpected in a restore is logged there, with its traceback.
            (operation, fault) == ("claim", "broken") and f"the session {key} could not be restored" in logged(caplog)
        )
    # A copy that cannot be served ends as one whose client has gone does.
    assert not any("crashed" in text for text in logged(caplog))


async def test_a_new_session_that_is_refused_is_logged_with_its_key(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.retention = RetentionPolicy(anonymous=1)
    async with instance(store) as one:
        await one.client().handshake()
        assert (await one.client().initialize()).status == 503
        assert any(re.match(f"the new session {KEY} is refused: ", text) for text in logged(caplog))
        store.down("create")
        assert (await one.client().initialize()).status == 503
        assert any(re.match(f"a request for the session {KEY} is refused for now", text) for text in logged(caplog))


async def test_a_restore_that_fails_is_logged_with_the_sessions_key(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    async def on_restore(*_: Any) -> None:
        raise RuntimeError("the application's bug")

    notes = Notes()

    async def refuse(_ctx: RequestContext) -> None:
        raise RuntimeError("the application's bug")

    async with instance(store) as one:
        session_id = await one.client().handshake()
    key = session_key(session_id)
    async with instance(store, on_restore=on_restore) as one:
        assert_not_handled(await one.client(session_id).ping())
        assert f"the session {key} could not be restored" in logged(caplog)
    notes.on_initialize = refuse
    async with instance(store, notes) as one:
        assert (await one.client(session_id).ping()).status == 404
        assert any(text.startswith(f"the session {key} cannot be restored by this instance") for text in logged(caplog))


async def test_a_server_loop_that_crashes_is_logged_with_the_sessions_key(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    async with instance(store) as one:
        session_id = await one.client().handshake()
    monkeypatch.setattr(JSONRPCDispatcher, "run", broken)
    async with instance(store) as one:
        assert_not_handled(await one.client(session_id).ping())
    assert f"the server loop of the session {session_key(session_id)} crashed; the session can be restored" in logged(
        caplog
    )


async def test_a_handshake_that_cannot_be_served_is_logged_with_its_sessions_key(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(StreamableHTTPServerTransport, "handle_request", broken)
    async with instance(store) as one:
        assert (await one.client().initialize()).status == 503
    assert any(re.fullmatch(f"a handshake of the session {KEY} could not be served", text) for text in logged(caplog))


async def test_an_eviction_that_fails_is_logged_with_the_sessions_key(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    async with instance(store) as one:
        session_id = await one.client().handshake()
        await one.at_rest()
        session = resident_of(one.manager, session_id)
        with monkeypatch.context() as patch:
            patch.setattr(session.transport, "terminate", broken)
            registry_of(one.manager).evict_soon(session)
            failed = f"the background task eviction of session {session_key(session_id)} failed, and tries again"
            await until(lambda: failed in logged(caplog))


async def test_logs_of_events_hold_neither_session_ids_nor_event_ids_nor_payload(
    store: FaultyStore, log: FaultyLog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.streams.reader.RETRY", 0.01)
    caplog.set_level(logging.DEBUG, logger="mcp_session_store")
    secrets = [PAYLOAD]
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        for error in (StoreUnavailable("it is down"), EventTooLarge("it is too large"), RuntimeError("a bug")):
            for operation in ("append", "read", "heads", "beat", "sweep"):
                client = one.client()
                secrets.append(await client.handshake(PARAMS))
                call, exchange = await talking.call(client, request_id=f"{PAYLOAD}-{operation}")
                stream = await opened(client)
                await until(lambda exchange=exchange: exchange.last_event_id is not None)  # type: ignore[misc]
                resumed = await opened(client, await exchange.leave())
                log.failing(error, operation)
                with contextlib.suppress(type(error)):
                    await instances_of(one.manager).beat()
                    await sweep_events(log)
                await call.say(PAYLOAD, PAYLOAD)
                await call.tell(PAYLOAD, "\ud800")
                call.answer("\ud800" if operation == "read" else PAYLOAD)
                await client.open_stream(exchange.last_event_id).start()
                log.lose(client.session_id)
                await client.open_stream(stream.last_event_id).start()
                log.up()
                await all_stored(one)
                await one.terminate(str(client.session_id))
                secrets += [str(event.id) for some in (exchange, stream, resumed) for event in some.events if event.id]
                await client.delete()
    ours = [record for record in caplog.records if record.name.startswith("mcp_session_store")]
    assert len({record.getMessage() for record in ours}) >= 4, "the scenario reaches most of what is logged"
    formatter = logging.Formatter("%(message)s")
    for record in ours:
        text = formatter.format(record)
        for secret in secrets:
            assert secret not in text


@pytest.mark.parametrize("operation", ["append", "read"])
@pytest.mark.parametrize("error", [EventTooLarge("it is too large"), RuntimeError("a bug")], ids=["refused", "bug"])
async def test_a_failure_about_the_events_of_one_session_names_its_key(
    store: FaultyStore,
    log: FaultyLog,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    error: Exception,
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.streams.reader.RETRY", 0.01)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client, other = one.client(), one.client()
        key = session_key(await client.handshake(PARAMS))
        await other.handshake(PARAMS)
        call, exchange = await talking.call(client)
        await call.say("a")
        await until(lambda: len(exchange.messages) == 1)
        resumed = await opened(client, await exchange.leave())
        log.failing(error, operation)
        await call.say("b")
        await until(lambda: any(record.levelno >= logging.WARNING for record in caplog.records))
        log.up()
        call.answer()
        await resumed.end()
    failures = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(str(key) in failure for failure in failures), failures


async def test_nobody_configures_the_root_logger(store: FaultyStore) -> None:
    before = (logging.root.level, list(logging.root.handlers), logging.root.disabled)
    async with instance(store) as one:
        await one.client().handshake()
    assert (logging.root.level, list(logging.root.handlers), logging.root.disabled) == before
    assert logging.getLogger("mcp_session_store").handlers == []
    assert logging.getLogger("mcp_session_store").level == logging.NOTSET
