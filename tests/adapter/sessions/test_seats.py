"""Seats in a full memory: a request that opens no session takes none, whatever it looks like."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError

from mcp_session_store import RetentionPolicy
from mcp_session_store.adapter.sessions import registry as registry_module
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance
from tests.support.internals import exit_stack_of, registry_of, stopping_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore, Sessions
    from tests.support.instances import Instance, RequestContext

pytestmark = pytest.mark.anyio

INITIALIZE: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": INITIALIZE_PARAMS}


def whole(**changes: Any) -> bytes:
    """Return the body of an `initialize`, with changes."""
    return json.dumps({**INITIALIZE, **changes}).encode()


OPENING_NOTHING: dict[str, Callable[[Client], Exchange]] = {
    "a wrong Host": lambda client: client.open("POST", whole(), host="evil.example"),
    "a wrong Origin": lambda client: client.open("POST", whole(), origin="https://evil.example"),
    "params that are none": lambda client: client.open("POST", whole(params={"capabilities": 1})),
    "params that are too large": lambda client: client.open_initialize({**INITIALIZE_PARAMS, "more": "x" * 70_000}),
    "a number that is not finite": lambda client: client.open("POST", whole(params={"n": float("inf")})),
    "no JSON": lambda client: client.open("POST", b'{"initialize"'),
    "no JSON-RPC": lambda client: client.open("POST", b'["initialize"]'),
    "another method": lambda client: client.open_request("ping", {"of": "initialize"}),
    "no Accept": lambda client: client.open("POST", whole(), accept=None),
    "another Accept": lambda client: client.open("POST", whole(), accept="text/html"),
    "no content type": lambda client: client.open("POST", whole(), content_type=None),
    "another content type": lambda client: client.open("POST", whole(), content_type="text/plain"),
    "a notification": lambda client: client.open("POST", b'{"jsonrpc":"2.0","method":"initialize"}'),
    "GET": lambda client: client.open("GET", whole()),
    "DELETE": lambda client: client.open("DELETE", whole()),
    "PUT": lambda client: client.open("PUT", whole()),
}
SECURITY = TransportSecuritySettings(
    enable_dns_rebinding_protection=True, allowed_hosts=["127.0.0.1:*"], allowed_origins=["http://127.0.0.1:*"]
)


async def filled(one: Instance, sessions: int) -> dict[str, Client]:
    """Fill the memory; return the clients by their sessions."""
    clients = [one.client() for _ in range(sessions)]
    filled = {await client.handshake(): client for client in clients}
    await one.at_rest()
    return filled


def in_memory(one: Instance) -> set[str]:
    """Return the sessions whose copies requests find."""
    return {session.session_id for session in registry_of(one.manager)}


@pytest.mark.parametrize("what", OPENING_NOTHING)
async def test_a_request_that_opens_no_session_evicts_none(store: FaultyStore, json_response: bool, what: str) -> None:
    async with instance(store, max_sessions=2, json_response=json_response, transport_security=SECURITY) as one:
        clients = await filled(one, 2)
        for _ in range(3):
            refused = await OPENING_NOTHING[what](one.client()).answer()
            assert refused.session_id is None
            # Its own answer, although the memory is full.
            assert refused.status in (400, 403, 405, 406, 421) or "error" in refused.messages[-1]
            assert refused.status != 503
        assert in_memory(one) == set(clients)
        await until(lambda: not stopping_in(one.manager))
        for client in clients.values():
            assert (await client.ping()).status == 200
        assert one.notes.replayed("initialize") == []
        assert (await one.client().initialize()).status == 200
        one.assert_seats_match()


@pytest.mark.parametrize("why", ["the application refuses", "the store fails", "the policy allows no more"])
async def test_a_handshake_that_fails_evicts_none(
    store: FaultyStore, sessions: Sessions, json_response: bool, why: str
) -> None:
    notes = Notes()

    async def refuse(_ctx: RequestContext) -> None:
        raise MCPError(code=-32001, message="not you")

    async with instance(store, notes, max_sessions=2, json_response=json_response) as one:
        clients = await filled(one, 2)
        if why == "the application refuses":
            notes.on_initialize = refuse
        elif why == "the store fails":
            store.broken("create")
        else:
            sessions.retention = RetentionPolicy(anonymous=2)
        for _ in range(5):
            answer = await one.client().initialize()
            assert answer.session_id is None
        assert in_memory(one) == set(clients)
        store.up()
        notes.on_initialize = None
        sessions.retention = RetentionPolicy()
        assert (await one.client().initialize()).status == 200
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


async def test_a_copy_leaves_only_when_the_handshake_is_committed(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, max_sessions=1, json_response=json_response) as one:
        ((session_id, client),) = (await filled(one, 1)).items()
        create = store.hold("create")
        opening = one.client().open_initialize()
        await create.wait_entered()
        assert in_memory(one) == {session_id}
        assert (await client.ping()).status == 200
        # The place is promised to one handshake at a time.
        assert (await one.client().initialize()).status == 503
        create.release()
        assert (await opening.answer()).status == 200
        assert in_memory(one) == {opening.session_id}
        one.assert_seats_match()


async def test_a_handshake_is_refused_whose_place_came_into_use_meanwhile(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, max_sessions=1, json_response=json_response) as one:
        ((session_id, client),) = (await filled(one, 1)).items()
        create = store.hold("create")
        opening = one.client().open_initialize()
        await create.wait_entered()
        stream = await client.get_stream()
        create.release()
        answer = await opening.answer()
        assert (answer.status, answer.session_id) == (503, None)
        assert in_memory(one) == {session_id}
        stream.disconnect()
        await stream.end()
        one.assert_seats_match()
        assert (await one.client().initialize()).status == 200


async def test_a_flood_that_opens_nothing_is_bounded_and_keeps_no_client_out(
    store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "OPENING", 20)
    notes = Notes()
    reached, proceed = 0, anyio.Event()

    async def hold(ctx: RequestContext) -> None:
        nonlocal reached
        if (ctx.params or {}).get("flood"):
            reached += 1
            await proceed.wait()
            raise MCPError(code=-32001, message="not you")

    notes.on_initialize = hold
    async with instance(store, notes, max_sessions=3, json_response=json_response) as one:
        clients = await filled(one, 3)
        flood = [one.client().open_initialize({**INITIALIZE_PARAMS, "flood": 1}) for _ in range(19)]
        await until(lambda: reached == 19)
        for client in clients.values():
            assert (await client.ping()).status == 200
        newcomer = one.client()
        assert (await newcomer.initialize()).status == 200
        await one.at_rest()
        assert len(in_memory(one) & set(clients)) == 2
        # No more at once than the bound.
        flood += [one.client().open_initialize({**INITIALIZE_PARAMS, "flood": 1}) for _ in range(40)]
        await until(lambda: reached == 20 and sum(one.over.is_set() for one in flood) == 39)
        proceed.set()
        answers = [await exchange.answer() for exchange in flood]
        assert [answer.status for answer in answers].count(503) == 39
        assert {answer.session_id for answer in answers} == {None}
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()
        assert one.notes.replayed("initialize") == []


async def test_copies_that_were_not_opened_and_whose_clean_up_hangs_do_not_pile_up(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "OPENING", 2)
    notes = Notes()
    proceed = anyio.Event()

    async def refuse(ctx: RequestContext) -> None:
        exit_stack_of(ctx).push_async_callback(proceed.wait)
        raise MCPError(code=-32001, message="not you")

    notes.on_initialize = refuse
    async with instance(store, notes, max_sessions=1) as one:
        statuses = [(await one.client().initialize()).status for _ in range(6)]
        assert statuses == [200, 200, 200, 503, 503, 503]
        assert len(stopping_in(one.manager)) == 3
        proceed.set()
        await until(lambda: not stopping_in(one.manager))
        notes.on_initialize = None
        assert (await one.client().initialize()).session_id is not None
        one.assert_seats_match()
