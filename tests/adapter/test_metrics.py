"""Metrics, read back through OpenTelemetry's SDK: every name, with a value, by what a server really does."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from mcp_session_store import (
    EventPolicy,
    RestoreRefused,
    RetentionPolicy,
    SqlEventLog,
    SqlSessionStore,
    StoreUnavailable,
    session_key,
    telemetry,
)
from mcp_session_store.records import Changes, EndReason
from tests.support.asgi import until
from tests.support.instances import Notes, instance, open_session, principal
from tests.support.internals import rows_of
from tests.support.measured import measuring
from tests.support.rows import insert_events, insert_rows, log_rows, session_row
from tests.support.streams import away, opened
from tests.support.talking import Talking

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from mcp_session_store import SessionRecord, SessionRestoreMarker
    from mcp_session_store.store import Absence
    from tests.support.faulty_stores import FaultyStore
    from tests.support.measured import Measured, Point

pytestmark = pytest.mark.anyio

HOURS = timedelta(hours=2)


@pytest.fixture
def measured() -> Measured:
    return measuring()


class Store(SqlSessionStore):
    """A store that can be away."""

    away = False

    async def find(self, key: UUID) -> SessionRecord | Absence:
        if self.away:
            raise StoreUnavailable("away")
        return await super().find(key)

    async def changes(self, since: datetime | None) -> Changes:
        if self.away:
            raise StoreUnavailable("away")
        return await super().changes(since)


async def test_every_instrument_has_a_value(migrated_url: str, measured: Measured) -> None:
    mine: dict[str, Any] = {"namespace": f"measured-{uuid4().hex}"}
    unreadable_id = uuid4().hex
    await insert_rows(
        migrated_url,
        [
            session_row(ended=HOURS, **mine),
            session_row(opened=HOURS, expires=-HOURS / 2, **mine),
            session_row(key=session_key(unreadable_id), initialize_params="7", **mine),
        ],
    )
    await insert_events(migrated_url, [log_rows([HOURS], **mine)])
    policy = RetentionPolicy(idle=timedelta(hours=1), tombstone=timedelta(hours=1))
    store = Store(migrated_url, retention=policy, **mine)
    log = SqlEventLog(store, policy=EventPolicy(max_age=timedelta(hours=1)))
    restoring: list[Point] = []

    async def on_restore(*_: Any) -> None:
        restoring.extend(measured.read()["mcp_session_store.sessions.restoring"])

    talking = Talking()
    options: dict[str, Any] = {"max_sessions": 1, "sweep_interval": 0.1, "end_within": 0.2, "outage_patience": 20}
    async with store, instance(store, talking.notes, events=log, on_restore=on_restore, **options) as one:
        client = one.client()
        await client.handshake()
        await client.get_stream()
        (streams,) = measured.read()["mcp_session_store.streams.open"]
        assert (streams.value, streams.attributes) == (1, {telemetry.NAMESPACE: mine["namespace"]})
        await client.delete()
        client = one.client()
        await client.begin()
        async with instance(store) as other:
            await other.client(client.session_id).ping()
            await client.notify("notifications/roots/list_changed")
            await until(lambda: bool(measured.read()) and "mcp_session_store.messages.delivered" in measured.seen)
            await client.respond(1 << 29, {})
        call, last_event_id = await away(talking, client)
        (busy,) = measured.read()["mcp_session_store.sessions.busy"]
        assert busy.value == 1
        await call.say("b")
        resumed = await opened(client, last_event_id)
        call.answer()
        await resumed.end()
        await one.at_rest()
        await one.client().handshake()
        await client.ping()
        assert [point.value for point in restoring] == [1]
        assert (await one.client(unreadable_id).ping()).status == 404
        swept = {"mcp_session_store.sessions.purged", "mcp_session_store.events.removed"}
        await until(lambda: bool(measured.read()) and swept <= measured.seen)
        store.away = True
        waiting = one.client(unreadable_id).open_request("ping")
        await until(lambda: [point.value for point in measured.read()["mcp_session_store.requests.waiting"]] == [1])
        assert measured.values("mcp_session_store.instance.state") == {
            (("state", state),): state == "degraded" for state in telemetry.STATES
        }
        await until(lambda: bool(measured.read()) and "mcp_session_store.background.failures" in measured.seen)
        store.away = False
        await waiting.end()
        measured.read()
    assert {each.name for each in telemetry.INSTRUMENTS} - measured.seen == set()
    ((name, version),) = measured.scopes
    assert (name, bool(version)) == ("mcp_session_store", True)


class _Shown:
    """A running manager with one session in memory."""

    namespace = "shown"
    resident = busy = restoring = streams = waiting = 1
    state = "ready"


async def test_a_manager_that_is_closed_or_gone_is_not_shown(store: FaultyStore, measured: Measured) -> None:
    async with instance(store) as one:
        await one.client().handshake()
        assert sum(measured.values("mcp_session_store.sessions.resident").values()) == 1
        async with instance(store) as two:
            await two.client().handshake()
            # One number for the namespace, whichever managers there are.
            assert measured.values("mcp_session_store.sessions.resident") == {(): 2}
        assert measured.values("mcp_session_store.sessions.resident") == {(): 1}
    assert measured.values("mcp_session_store.sessions.resident") == {}

    gone = _Shown()
    with telemetry.observing(gone):
        assert measured.values("mcp_session_store.sessions.resident") == {(): 1}
        del gone
        gc.collect()
        assert measured.values("mcp_session_store.sessions.resident") == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform forks no processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_shows_its_own_managers_alone(measured: Measured) -> None:
    parents, childs = _Shown(), _Shown()
    with telemetry.observing(parents):
        if (pid := os.fork()) == 0:
            code = 1
            with contextlib.suppress(BaseException):
                assert measured.values("mcp_session_store.sessions.resident") == {}
                # Made before the fork, and run after it.
                with telemetry.observing(childs):
                    assert measured.values("mcp_session_store.sessions.resident") == {(): 1}
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert measured.values("mcp_session_store.sessions.resident") == {(): 1}


async def test_refused_requests_are_counted_with_the_true_reason_and_answered_alike(
    store: FaultyStore, other_store: FaultyStore, measured: Measured
) -> None:
    refuses = False

    async def on_restore(_: SessionRestoreMarker, __: SessionRecord) -> None:
        if refuses:
            raise RestoreRefused("no")

    alice = principal("alice")
    ended_id, expired_id, refused_id, moved_id = [await open_session(store) for _ in range(4)]
    alices_id = await open_session(store, user=alice)
    await other_store.end(session_key(ended_id), reason=EndReason.OPERATOR)
    row = rows_of(store.inner)[session_key(expired_id)]
    row.record = dataclasses.replace(row.record, expires_at=row.record.created_at)
    notes = Notes()
    async with instance(store, notes, on_restore=on_restore, sweep_interval=None) as one:
        unknown = await one.client("0" * 32).ping()
        measured.read()
        for session_id, reason in (
            ("0" * 32, "unknown"),
            ("\xe9", "malformed"),
            (ended_id, "ended"),
            (expired_id, "expired"),
            (alices_id, "another principal"),
        ):
            answer = await one.client(session_id).ping()
            assert (answer.status, answer.body) == (404, unknown.body)
            assert measured.values("mcp_session_store.requests.refused") == {(("reason", reason),): 1}, reason
        refuses = True
        assert (await one.client(refused_id).ping()).body == unknown.body
        refuses = False
        assert measured.values("mcp_session_store.requests.refused") == {(("reason", "refused"),): 1}

        async def other_version(_ctx: Any, result: Any) -> Any:
            result["protocolVersion"] = "2024-11-05"
            return result

        notes.after_initialize = other_version
        assert (await one.client(moved_id).ping()).body == unknown.body
        assert measured.values("mcp_session_store.requests.refused") == {(("reason", "other version"),): 1}


async def test_the_duration_of_a_session_is_that_of_its_whole_life(
    store: FaultyStore, sessions: Any, measured: Measured
) -> None:
    session_id = await open_session(store)
    sessions.ahead += timedelta(seconds=300)
    async with instance(store) as one:
        client = one.client(session_id)
        await client.ping()
        await client.delete()
        points = measured.read()["mcp.server.session.duration"]
    (point,) = points
    assert 300 <= point.total < 400
    assert point.attributes == {
        "mcp.protocol.version": "2025-11-25",
        "network.protocol.name": "http",
        "network.transport": "tcp",
        telemetry.NAMESPACE: "default",
    }
    # Those that the convention names, and more for sessions that outlive a process.
    assert point.bounds[:14] == (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


@pytest.mark.parametrize("reason", [EndReason.OPERATOR, EndReason.LIMIT])
async def test_an_end_from_elsewhere_is_recorded_where_the_session_is_in_memory(
    store: FaultyStore, measured: Measured, reason: EndReason
) -> None:
    async with instance(store, end_within=0.5) as one:
        session_id, elsewhere = await one.client().handshake(), await open_session(store)
        for ended in (session_id, elsewhere):
            await store.inner.end(session_key(ended), reason=reason)
        await until(lambda: one.residents == 0)
        read = measured.read()
        assert [point.value for point in read["mcp.server.session.duration"]] == [1]
        assert "mcp_session_store.sessions.ended" not in read


async def test_no_measurement_holds_a_session_id(store: FaultyStore, measured: Measured) -> None:
    async with instance(store) as one:
        client = one.client()
        session_id = await client.handshake()
        await client.ping()
        await client.delete()
        text = str(measured.read())
    assert "created" in text
    assert session_id not in text
    assert str(session_key(session_id)) not in text


def test_without_a_provider_the_instruments_do_nothing() -> None:
    # In a process of its own, because a provider stays.
    program = (
        "from mcp_session_store import telemetry\n"
        "names = {type(value).__name__ for value in vars(telemetry).values() if hasattr(value, 'add')"
        " or hasattr(value, 'record')}\n"
        "print(sorted(names))\n"
        "span = telemetry.begin_span('restore', 'default')\n"
        "assert not span.is_recording()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['_ProxyCounter', '_ProxyHistogram']"
