"""Spans, read back through OpenTelemetry's SDK: what belongs to which request, and what of it is a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from opentelemetry import trace

from mcp_session_store import session_key, telemetry
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance, open_session
from tests.support.internals import registry_of
from tests.support.measured import tracing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.faulty_stores import FaultyStore
    from tests.support.measured import Traced

pytestmark = pytest.mark.anyio

OLD_TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def traced() -> Iterator[Traced]:
    with tracing() as traced:
        yield traced


def named(spans: list[Any], name: str) -> list[Any]:
    return [span for span in spans if span.name == name]


async def test_a_restore_and_its_replay_belong_to_the_request_that_caused_them(
    store: FaultyStore, traced: Traced
) -> None:
    # The client's trace of that time is over.
    params = {**INITIALIZE_PARAMS, "_meta": {"traceparent": f"00-{OLD_TRACE}-b7ad6b7169203331-01", "other": 1}}
    session_id = await open_session(store, params)
    traced.take()
    notes = Notes()
    async with instance(store, notes) as one:
        client = one.client(session_id)
        with trace.get_tracer("test").start_as_current_span("request") as request:
            exchange = client.open_request("ping")
        await exchange.end()
        await one.at_rest()
        spans = traced.take()
        (restore,) = named(spans, "mcp_session_store.restore")
        assert restore.parent.span_id == request.get_span_context().span_id
        assert restore.attributes == {
            telemetry.NAMESPACE: "default",
            telemetry.KEY: str(session_key(session_id)),
        }
        replays = named(spans, "mcp_session_store.replay")
        assert [span.attributes["mcp.method.name"] for span in replays] == ["initialize", "notifications/initialized"]
        assert all(span.parent.span_id == restore.context.span_id for span in replays)
        assert all(span.attributes[telemetry.REPLAYED] for span in replays)
        # The SDK's own spans of the replayed messages are told from others by their parents.
        for replay in replays:
            (of_the_sdk,) = [span for span in spans if span.parent and span.parent.span_id == replay.context.span_id]
            assert of_the_sdk.name == replay.attributes["mcp.method.name"]
        assert not [span for span in spans if f"{span.context.trace_id:032x}" == OLD_TRACE]
        ((link,), ()) = [span.links for span in replays]
        assert f"{link.context.trace_id:032x}" == OLD_TRACE
        # What the handler gets is as it was, but for the trace.
        assert notes.replayed("initialize")[0].params["_meta"] == {"other": 1}  # type: ignore[index]
        # What the client sends later is no part of the restore.
        await client.ping()
        assert not any(span.parent and span.parent.span_id == restore.context.span_id for span in traced.take())


async def test_requests_that_wait_for_the_same_restore_are_linked(store: FaultyStore, traced: Traced) -> None:
    session_id = await open_session(store)
    entered, proceed = anyio.Event(), anyio.Event()

    async def on_restore(*_: object) -> None:
        entered.set()
        await proceed.wait()

    async with instance(store, on_restore=on_restore) as one:
        first = one.client(session_id).open_request("ping")
        await entered.wait()
        with trace.get_tracer("test").start_as_current_span("another") as another:
            second = one.client(session_id).open_request("ping", request_id=2)
        (restore,) = registry_of(one.manager).restores.values()
        await until(lambda: restore.waiters == 2)
        proceed.set()
        await first.end()
        await second.end()
    (made,) = named(traced.take(), "mcp_session_store.restore")
    assert [link.context.span_id for link in made.links] == [another.get_span_context().span_id]


async def test_a_restore_that_fails_says_why_without_what_a_client_sent(store: FaultyStore, traced: Traced) -> None:
    session_id = await open_session(store)

    async def on_restore(*_: object) -> None:
        raise RuntimeError("xyzzy")

    traced.take()
    async with instance(store, on_restore=on_restore) as one:
        await one.client(session_id).ping()
    (restore,) = named(spans := traced.take(), "mcp_session_store.restore")
    assert restore.attributes[telemetry.ERROR] == "RestoreFailed"
    assert restore.status.status_code is trace.StatusCode.ERROR
    assert "xyzzy" not in str([span.to_json() for span in spans])


async def test_handshakes_and_sweeps_have_spans_and_none_holds_a_session_id(store: FaultyStore, traced: Traced) -> None:
    async with instance(store, sweep_interval=0.05) as one:
        with trace.get_tracer("test").start_as_current_span("request") as request:
            exchange = (client := one.client()).open_initialize()
        answer = await exchange.answer()
        session_id = str(answer.session_id)
        spans: list[Any] = []

        def swept() -> bool:
            spans.extend(traced.take())
            return bool(named(spans, "mcp_session_store.sweep"))

        await until(swept)
        await client.delete()
    spans += traced.take()
    (handshake,) = named(spans, "mcp_session_store.handshake")
    assert handshake.parent.span_id == request.get_span_context().span_id
    assert session_id not in str([span.to_json() for span in spans])
    assert all(span.instrumentation_scope.version for span in spans if span.name.startswith("mcp_session_store"))
