"""Replayed messages are handled by the kernel of the server loop that serves the client's."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.exceptions import MCPError, NoBackChannelError
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher

from mcp_session_store.adapter.replay.context import ReplayedContext
from mcp_session_store.adapter.replay.replay import Replay
from mcp_session_store.adapter.sessions.restores import Restore
from tests.support.asgi import PATIENCE, until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance, open_session
from tests.support.internals import exit_stack_of, registry_of, stopping_in
from tests.support.stateful import Stateful, set_level

if TYPE_CHECKING:
    from mcp.server.context import ServerRequestContext
    from mcp.server.runner import ServerRunner

    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import RequestContext

pytestmark = pytest.mark.anyio


async def journaled(store: FaultyStore) -> str:
    """A session with one journaled call, which an instance that is gone has opened."""
    async with instance(store, Stateful()) as gone:
        client = gone.client()
        session_id = await client.handshake({**INITIALIZE_PARAMS, "capabilities": {"roots": {}}})
        await set_level(client, "debug")
    store.calls.clear()
    return session_id


def _comparable(value: Any) -> Any:
    plain = value is None or callable(value) or isinstance(value, str | int | frozenset | dict)
    return value if plain else type(value)


async def test_a_restored_copy_has_the_server_loop_that_the_sdk_makes_for_a_new_session(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatchers: list[dict[str, Any]] = []
    runners: list[ServerRunner[Any]] = []
    genuine = JSONRPCDispatcher.run

    async def noting(dispatcher: JSONRPCDispatcher[Any], on_request: Any, on_notify: Any, **settings: Any) -> None:
        runner = on_request.__self__
        assert on_notify.__self__ is runner
        assert runner.connection.outbound is dispatcher
        dispatchers.append({name: _comparable(value) for name, value in vars(dispatcher).items()})
        runners.append(runner)
        await genuine(dispatcher, on_request, on_notify, **settings)

    monkeypatch.setattr(JSONRPCDispatcher, "run", noting)
    async with instance(store) as one:
        client = one.client()
        session_id = await client.handshake()
        await one.at_rest()
        await one.terminate(session_id)
        assert (await client.ping()).status == 200
        new, restored = dispatchers
        assert new == restored
        assert new["_inline_methods"] == {"initialize"}
        first, second = runners
        for name in ("server", "lifespan_state", "init_options"):
            assert getattr(first, name) is getattr(second, name)
        connections = [
            {name: _comparable(value) for name, value in vars(runner.connection).items()} for runner in runners
        ]
        assert connections[0] == connections[1]
        assert connections[0]["session_id"] == session_id


async def test_a_replayed_request_has_an_id_of_its_own_and_a_replayed_notification_none(store: FaultyStore) -> None:
    session_id = await journaled(store)
    ids: dict[str, Any] = {}
    notes = Stateful()

    def note(ctx: RequestContext) -> None:
        ids[ctx.method] = ctx.request_id

    notes.on_message = note
    async with instance(store, notes) as one:
        assert (await one.client(session_id).ping()).status == 200
    assert ids["notifications/initialized"] is None
    replayed = [ids["initialize"], ids["logging/setLevel"]]
    assert all(isinstance(request_id, str) and request_id.startswith("restore-") for request_id in replayed)
    assert len({*replayed, ids["ping"]}) == 3


def test_workers_that_are_forked_after_the_import_give_replayed_requests_other_ids() -> None:
    code = """
import os
from mcp_session_store.adapter.replay.context import next_request_id
worker = os.fork()
if worker:
    os.waitpid(worker, 0)
print(next_request_id(), flush=True)
"""
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=150)
    first, second = finished.stdout.split()
    assert first != second


current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="nothing")


async def test_each_replayed_message_is_handled_in_a_copy_of_its_own_of_the_requests_context(
    store: FaultyStore,
) -> None:
    session_id = await journaled(store)
    found: list[tuple[str, str]] = []
    notes = Stateful()

    def leave(ctx: RequestContext) -> None:
        found.append((ctx.method, current.get()))
        current.set(ctx.method)

    async def push(ctx: RequestContext) -> None:
        # What `initialize` set stays set while it is handled, though it waits.
        await anyio.sleep(0)
        assert current.get() == "initialize"
        exit_stack_of(ctx).callback(lambda: found.append(("the clean-up", current.get())))

    notes.on_message, notes.on_initialize = leave, push
    async with instance(store, notes) as one:
        token = current.set("the request")
        try:
            assert (await one.client(session_id).ping()).status == 200
        finally:
            current.reset(token)
        await one.terminate(session_id)
        await until(lambda: len(found) == 5)
    assert found == [
        ("initialize", "the request"),
        ("notifications/initialized", "the request"),
        ("logging/setLevel", "the request"),
        ("ping", "the request"),
        ("the clean-up", "the request"),
    ]


@pytest.mark.parametrize("late", ["notifications/initialized", "logging/setLevel"])
async def test_a_late_handler_has_ended_before_its_connection_is_cleaned_up(store: FaultyStore, late: str) -> None:
    session_id = await journaled(store)
    ended: list[str] = []
    notes = Stateful()

    async def hang(ctx: RequestContext) -> None:
        if ctx.method != late:
            return
        exit_stack_of(ctx).callback(ended.append, "the clean-up")
        try:
            await anyio.sleep_forever()
        finally:
            # As a handler does that tidies up.
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            ended.append("the handler")

    notes.on_initialized = notes.on_state = hang
    async with instance(store, notes, replay_timeout=0.5) as one:
        assert (await one.client(session_id).ping()).status == 200
        # It keeps the copy in memory.
        assert registry_of(one.manager).get(session_id).in_flight == 1  # type: ignore[union-attr]
        await one.terminate(session_id)
        await until(lambda: len(ended) == 2)
    assert ended == ["the handler", "the clean-up"]


async def test_the_connection_of_a_restore_that_failed_is_cleaned_up(store: FaultyStore) -> None:
    session_id = await open_session(store)
    ended: list[str] = []
    notes = Notes()

    async def fail(ctx: RequestContext) -> None:
        exit_stack_of(ctx).callback(ended.append, "the clean-up")
        raise RuntimeError("the application's bug")

    notes.on_initialize = fail
    async with instance(store, notes) as one:
        assert (await one.client(session_id).ping()).status == 404
        await until(lambda: not stopping_in(one.manager))
    assert ended == ["the clean-up"]


@pytest.mark.parametrize("error", [RuntimeError("the application's bug"), MCPError(code=-32001, message="not you")])
async def test_a_replayed_handler_that_crashes_is_logged_with_its_traceback_and_a_refusal_is_not(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    session_id = await journaled(store)
    notes = Stateful()

    async def fail(_ctx: RequestContext) -> None:
        raise error

    notes.on_state = fail
    async with instance(store, notes) as one:
        assert (await one.client(session_id).ping()).status == 200
    crashes = [record for record in caplog.records if record.exc_info is not None]
    if isinstance(error, MCPError):
        assert crashes == []
    else:
        (crash,) = crashes
        assert crash.getMessage() == "handler for a replayed 'logging/setLevel' raised"


async def test_no_client_hears_of_a_replayed_call_that_is_cancelled_with_its_copy(store: FaultyStore) -> None:
    session_id = await journaled(store)
    notes = Stateful()

    async def hang(_ctx: RequestContext) -> None:
        await anyio.sleep_forever()

    notes.on_state = hang
    async with instance(store, notes, replay_timeout=0.5) as one:
        client = one.client(session_id)
        stream = await client.get_stream()
        call = client.open_call("wait")
        await until(lambda: notes.waiting == 1)
        session = registry_of(one.manager).get(session_id)
        assert session is not None
        assert session.in_flight == 2
        assert (await client.delete()).status == 200
        await stream.end()
        # Calls of the client's are answered when their session ends.
        assert [message["id"] for message in (await call.answer()).messages] == [1]
        assert stream.messages == []
        await until(lambda: session.in_flight == 0)


async def test_a_replayed_request_sends_its_client_nothing_and_can_ask_it_nothing(
    store: FaultyStore, json_response: bool
) -> None:
    session_id = await journaled(store)
    notes = Stateful()
    refused: list[str] = []

    async def tell(ctx: ServerRequestContext[Any, Any]) -> None:
        assert not ctx.session.can_send_request
        await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)
        await ctx.session.report_progress(0.5)
        try:
            with anyio.fail_after(PATIENCE):
                await ctx.session.elicit_form("Why?", {"type": "object"}, related_request_id=ctx.request_id)
        except NoBackChannelError:
            refused.append(ctx.method)

    async def tell_late(ctx: RequestContext) -> None:
        # When the stream is open that would carry it.
        await opened.wait()
        await tell(ctx)

    opened = anyio.Event()
    notes.on_initialize, notes.on_state = tell, tell_late
    async with instance(store, notes, json_response=json_response, replay_timeout=0.5) as one:
        client = one.client(session_id)
        stream = await client.get_stream()
        opened.set()
        await until(lambda: len(refused) == 2)
        await anyio.wait_all_tasks_blocked()
        assert stream.messages == []


@pytest.mark.parametrize("related", [None, 1], ids=["on its own", "related to the notification"])
async def test_what_the_replayed_notifications_handler_says_goes_to_the_client(
    store: FaultyStore, json_response: bool, related: int | None
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    opened = anyio.Event()

    async def tell(ctx: RequestContext) -> None:
        await opened.wait()
        # With any related id the SDK sends it through the dispatch context.
        await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=related)

    notes.on_initialized = tell
    async with instance(store, notes, json_response=json_response, replay_timeout=1) as one:
        stream = await one.client(session_id).get_stream()
        opened.set()
        assert (await stream.next())["method"] == "notifications/tools/list_changed"


async def test_a_replayed_call_can_send_the_client_requests_on_the_sessions_own_stream(store: FaultyStore) -> None:
    session_id = await journaled(store)
    notes = Stateful()
    roots: list[Any] = []

    async def ask(ctx: RequestContext) -> None:
        roots.append(await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    notes.on_state = ask
    async with instance(store, notes, replay_timeout=0.5) as one:
        client = one.client(session_id)
        stream = await client.get_stream()
        question = await stream.next()
        assert (await client.respond(question["id"], {"roots": []})).status == 202
        await until(lambda: len(roots) == 1)
        assert len(notes.set_again) == 1


async def test_a_restore_starts_one_task_for_its_copy_one_for_the_notification_and_the_transports(
    store: FaultyStore,
) -> None:
    session_id = await open_session(store)
    started: list[asyncio.Task[Any]] = []

    def counting(loop: asyncio.AbstractEventLoop, coroutine: Any, **settings: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **settings)
        started.append(task)
        return task

    async with instance(store, json_response=True) as one:
        client = one.client(session_id)
        await client.ping()
        await one.terminate(session_id)
        await until(lambda: one.residents == 0)
        loop = asyncio.get_running_loop()
        loop.set_task_factory(counting)
        try:
            assert (await client.ping()).status == 200
        finally:
            loop.set_task_factory(None)
    # Its client's first, and the handler of the call last.
    assert [task.get_name().rpartition(".")[2] for task in started[1:-1]] == [
        "_run_restore",
        "message_router",
        "_notify",
    ]


async def test_a_restored_copy_outlives_the_time_that_its_replay_had(store: FaultyStore) -> None:
    session_id = await open_session(store)
    store.claims_first = True
    async with instance(store, replay_timeout=0.5) as one:
        client = one.client(session_id)
        claim = store.hold("claim")
        call = client.open_request("ping")
        await claim.wait_entered()
        # The store has a time of its own.
        await anyio.sleep(1.2)
        claim.release()
        assert (await call.answer()).status == 200
        await anyio.sleep(1.2)
        assert (await client.ping()).status == 200
        assert len(one.notes.replayed("initialize")) == 1


async def test_a_copy_keeps_nothing_of_its_restore(store: FaultyStore) -> None:
    def held() -> list[Any]:
        gc.collect()
        return [held for held in gc.get_objects() if isinstance(held, Replay | Restore | ReplayedContext)]

    session_id = await journaled(store)
    async with instance(store, Stateful()) as one:
        # Other tests may have left some, in what was logged.
        before = {id(left): left for left in held()}
        assert (await one.client(session_id).ping()).status == 200
        # Not even before the client's next message is read.
        assert [kept for kept in held() if id(kept) not in before] == []
