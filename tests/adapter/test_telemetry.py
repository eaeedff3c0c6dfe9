"""What is counted: each thing once, and nothing of the session or its payload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mcp_session_store import EndReason, session_key, telemetry
from tests.support.asgi import until
from tests.support.instances import instance
from tests.support.streams import all_stored, away, opened
from tests.support.talking import Talking

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyLog, FaultyStore

pytestmark = pytest.mark.anyio


COUNTERS = (
    "created",
    "ended",
    "events",
    "evicted",
    "outages",
    "purged",
    "refused",
    "removed_events",
    "restored",
    "resumed",
    "unreadable",
)


class Counted:
    """What the counters were told, by their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added: dict[str, list[tuple[int, dict[str, str]]]] = {}
        for name in COUNTERS:
            monkeypatch.setattr(telemetry, name, self._counter(name))

    def _counter(self, name: str) -> object:
        added = self.added.setdefault(name, [])

        class Counter:
            def add(self, amount: int, attributes: dict[str, str] | None = None) -> None:
                counted = dict(attributes or {})
                assert counted.pop(telemetry.NAMESPACE) == "default"
                added.append((amount, counted))

        return Counter()

    def take(self) -> dict[str, list[tuple[int, dict[str, str]]]]:
        """What was counted since the last time."""
        taken = {name: list(added) for name, added in self.added.items() if added}
        for added in self.added.values():
            added.clear()
        return taken


async def test_a_sessions_life_is_counted(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    async with instance(store, max_sessions=1, sweep_interval=None, end_within=3600.0) as one:
        client = one.client()
        session_id = await client.handshake()
        await one.at_rest()
        assert counted.take() == {"created": [(1, {})]}
        other = one.client()
        other_id = await other.handshake()
        await one.at_rest()
        assert counted.take() == {"created": [(1, {})], "evicted": [(1, {"reason": "memory full"})]}
        await client.ping()
        assert counted.take() == {"restored": [(1, {})], "evicted": [(1, {"reason": "memory full"})]}
        await client.delete()
        assert counted.take() == {"ended": [(1, {"reason": "client"})], "evicted": [(1, {"reason": "ended"})]}
        # Ended elsewhere, it is counted there.
        await other.ping()
        counted.take()
        await other_store.end(session_key(other_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        assert counted.take() == {"evicted": [(1, {"reason": "ended"})]}
        # What opens no session leaves no memory that it was in.
        await one.client().ping()
        assert counted.take() == {}
        assert (await one.client(session_id).ping()).status == 404
        assert counted.take() == {"refused": [(1, {"reason": "ended"})]}
        store.down("load", "create")
        await one.client(session_id).ping()
        await one.client().initialize()
        assert counted.take() == {"outages": [(1, {})], "refused": [(1, {"reason": "unavailable"})] * 2}
        store.up()
        await client.initialize()
        third = one.client()
        await third.handshake()
        await third.get_stream()
        counted.take()
        await one.client().initialize()
        assert counted.take() == {"refused": [(1, {"reason": "memory full"})]}


async def test_what_becomes_of_events_and_of_resumed_streams_is_counted(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    talking = Talking()
    async with instance(store, talking.notes, events=log, sweep_interval=None) as one:
        client = one.client()
        session_id = await client.handshake()
        counted.take()
        call, exchange = await talking.call(client)
        await call.say("a")
        call.answer()
        await exchange.end()
        assert counted.take() == {"events": [(1, {"outcome": "stored"})] * 2}
        call, last_event_id = await away(talking, client)
        other, other_exchange = await talking.call(client)
        counted.take()
        log.down("append")
        await call.say("b")
        await until(lambda: counted.added["events"] != [])
        await other.say("c")
        await until(lambda: len(other_exchange.messages) == 1)
        taken = counted.take()
        assert taken["events"] == [(1, {"outcome": "kept"}), (1, {"outcome": "live"})]
        log.up()
        await all_stored(one)
        assert counted.take()["events"] == [(1, {"outcome": "stored"})]
        resumed = await opened(client, last_event_id)
        await until(lambda: len(resumed.messages) == 1)
        await resumed.leave()
        assert counted.take() == {"resumed": [(1, {"outcome": "left"})]}
        resumed = await opened(client, last_event_id)
        call.answer()
        await resumed.end()
        assert counted.take() == {"events": [(1, {"outcome": "stored"})], "resumed": [(1, {"outcome": "complete"})]}
        log.lose(session_id)
        await client.open_stream(last_event_id).end()
        assert counted.take() == {"resumed": [(1, {"outcome": "trimmed"})]}
        await (await opened(client)).leave()
        counted.take()
        # What is refused is no stream, and is counted as refused where it costs the store anything.
        assert (await client.open_stream("malformed").answer()).status == 400
        assert counted.take() == {}
        log.down("read")
        assert (await client.open_stream(last_event_id).answer()).status == 503
        assert counted.take() == {"refused": [(1, {"reason": "unavailable"})]}
