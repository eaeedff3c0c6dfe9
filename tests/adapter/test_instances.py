"""Instances and their numbers: heartbeats with and without events, and how a mailbox is given."""

from __future__ import annotations

import importlib.metadata
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store import (
    ConfigurationError,
    DurableSessionManager,
    MemoryEventLog,
    MemoryMailbox,
    MemorySessionStore,
    SqlMailbox,
    SqlSessionStore,
    StoreUnavailable,
    durable_app,
)
from mcp_session_store.adapter.instances import DRAWS
from mcp_session_store.adapter.question_ids import number_of
from mcp_session_store.errors import SessionStoreError
from mcp_session_store.mailbox import MessageKind, NewMessage, Presence
from mcp_session_store.records import session_key
from mcp_session_store.stream_mail import STREAM_MESSAGE_LIFETIME
from mcp_session_store.testing.factories import new_stream_message
from tests.support.asgi import until
from tests.support.instances import Notes, instance, lone_instance, open_session, running
from tests.support.internals import instances_of, outbound_of, question_ids_of
from tests.support.measured import measuring

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Clock

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("events", [False, True], ids=["no events", "events"])
async def test_an_instance_says_what_it_is_as_long_as_it_runs(store: FaultyStore, log: FaultyLog, events: bool) -> None:
    mailbox = log.mailbox if events else store.mailbox
    async with instance(store, Notes("ledger"), events=log if events else False, instance_timeout=0.3) as one:
        client = one.client()
        await client.handshake()
        await client.get_stream()
        await until(lambda: (mailbox.beats[-1].residents, mailbox.beats[-1].streams) == (1, 1))
        (row,) = await mailbox.inner.instances()
        assert (row.instance, row.server) == (one.manager.instance, "ledger")
        assert row.version == importlib.metadata.version("mcp-session-store")
        assert (row.residents, row.streams) == (1, 1)
        assert row.number is not None
        assert instances_of(one.manager).is_entered
    assert await mailbox.inner.instances() == []


async def test_the_number_of_an_instance_is_in_what_it_asks(store: FaultyStore) -> None:
    notes = Notes()

    async def ask(ctx: Any) -> None:
        await outbound_of(ctx).send_raw_request("roots/list", None)

    notes.on_initialized = ask
    session_id = await open_session(store)
    async with instance(store, notes) as one:
        question = await (await one.client(session_id).get_stream()).next()
        (row,) = await store.mailbox.inner.instances()
        assert number_of(question["id"]) == row.number


async def test_an_instance_that_relays_nothing_has_no_number_for_others() -> None:
    store = MemorySessionStore()
    manager = DurableSessionManager(Notes().server, store, mailbox=MemoryMailbox(store), relay=False)
    async with manager.run():
        (row,) = await MemoryMailbox(store).instances()
        assert row.number is None
        assert not instances_of(manager).is_entered


async def test_a_number_that_another_instance_has_is_drawn_again(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.mailbox.inner.beat(Presence(instance="other:1:00000000", number=7))
    draws = iter([7, 7, 8])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(draws) - 1)
    store.mailbox.holds = True
    async with instance(store) as one:
        assert [beat.number for beat in store.mailbox.beats[:2]] == [7, 8]
        assert sorted(row.number or 0 for row in await store.mailbox.inner.instances()) == [7, 8]
        # Hints come for the number that it has, and what its death releases is held all along.
        await until(lambda: store.mailbox.background["listen"] >= 1)
        before = store.mailbox.background["beat"]
        draws = iter([9])
        question_ids_of(one.manager).draw()
        await until(lambda: store.mailbox.background["listen"] >= 2 and store.mailbox.background["beat"] > before)
        await until(lambda: [number for number, _ in store.inner.data.mail_listeners] == [9])
        assert sorted(row.number or 0 for row in await store.mailbox.inner.instances()) == [7, 9]


async def test_a_mailbox_in_which_no_number_is_free_is_not_asked_for_ever(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = lone_instance(store.mailbox)

    async def full(_: Presence) -> bool:
        return False

    monkeypatch.setattr(store.mailbox.inner, "beat", full)
    with pytest.raises(SessionStoreError, match="no number is free"):
        await one.beat()
    assert store.mailbox.background["beat"] == DRAWS
    assert not one.is_entered


async def test_the_number_is_entered_when_a_store_that_was_away_at_the_start_is_back(store: FaultyStore) -> None:
    store.down()
    store.mailbox.down()
    async with instance(store, instance_timeout=3600) as one:
        number = question_ids_of(one.manager).number
        await until(lambda: store.mailbox.background["beat"] >= 2)
        assert not instances_of(one.manager).is_entered
        store.up()
        store.mailbox.up()
        await until(lambda: instances_of(one.manager).is_entered)
        assert [row.number for row in await store.mailbox.inner.instances()] == [number]


async def test_a_recipient_reads_before_it_says_that_it_runs(store: FaultyStore) -> None:
    one = lone_instance(store.mailbox)
    order: list[str] = []

    async def read() -> None:
        order.append("read")

    async def note() -> None:
        order.append("beat")

    one.before_beat = read
    store.mailbox.before("beat", note)
    for _ in range(2):
        await one.beat()
    # Before the first heartbeat nothing can be there.
    assert order == ["beat", "read", "beat"]

    async def fail() -> None:
        raise StoreUnavailable("away")

    one.before_beat = fail
    with pytest.raises(StoreUnavailable):
        await one.beat()
    assert order == ["beat", "read", "beat"]


async def test_an_instance_sweeps_the_mailbox(store: FaultyStore) -> None:
    measured = measuring()
    gone = Presence(instance="other:1:00000000", number=7)
    await store.mailbox.inner.beat(gone)
    key = session_key(await open_session(store))
    message = NewMessage(recipient=7, sender=8, sequence=1, key=key, kind=MessageKind.ANSWER, body="{}")
    await store.mailbox.inner.post([message])
    del store.inner.data.instances["00000000"]
    await store.mailbox.inner.say([new_stream_message(2, key=key, sender=8)])
    [waiting] = store.inner.data.stream_mail.values()
    waiting.stored_at -= 2 * STREAM_MESSAGE_LIFETIME
    async with instance(store, sweep_interval=0.05):
        await until(lambda: store.mailbox.background["sweep"] >= 2)
    assert store.inner.data.mail == {}
    assert store.inner.data.stream_mail == {}
    assert measured.values("mcp_session_store.messages.dropped") == {
        (("kind", "answer"), ("reason", "recipient gone")): 1,
        (("kind", "stream_notification"), ("reason", "no stream")): 1,
    }
    store.mailbox.background.clear()
    async with instance(store, sweep_interval=None):
        await anyio.sleep(0.05)
    assert store.mailbox.background["sweep"] == 0


# How it is given


def manager_of(notes: Notes) -> DurableSessionManager:
    """The manager of an app."""
    assert isinstance(notes.server.session_manager, DurableSessionManager)
    return notes.server.session_manager


@pytest.mark.parametrize(
    ("options", "environment", "relays"),
    [
        ({}, None, True),
        ({"relay": True}, "false", True),
        ({"relay": False}, None, False),
        ({}, "no", False),
        ({}, "1", True),
    ],
)
async def test_stores_of_ours_have_a_mailbox_beside_them(
    sqlite_url: str,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    environment: str | None,
    relays: bool,
) -> None:
    if environment is not None:
        monkeypatch.setenv("MCP_SESSION_STORE_RELAY", environment)
    notes = Notes()
    async with running(durable_app(notes.server, sqlite_url, **options)):
        mailbox = manager_of(notes).mailbox
        assert isinstance(mailbox, SqlMailbox)
        (row,) = await mailbox.instances()
        assert (row.number is not None) is relays
    async with SqlSessionStore(sqlite_url) as store, SqlMailbox(store) as others:
        assert await others.instances() == []
    notes = Notes()
    durable_app(notes.server, MemorySessionStore(), **options)
    assert isinstance(manager_of(notes).mailbox, MemoryMailbox)


async def test_a_store_that_is_not_ours_has_to_bring_its_mailbox(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    durable_app(notes.server, store, relay=store.mailbox)
    assert manager_of(notes).mailbox is store.mailbox
    with pytest.raises(ConfigurationError, match=r"FaultyStore.*give its Mailbox as relay"):
        durable_app(Notes().server, store, relay=True)
    with pytest.raises(ConfigurationError, match=r"event_log needs a mailbox.*relay"):
        durable_app(Notes().server, store, events=log)
    # The variable is meant for all servers of an environment, so that a store without a mailbox is no error.
    monkeypatch.setenv("MCP_SESSION_STORE_RELAY", "true")
    notes = Notes()
    durable_app(notes.server, store)
    assert manager_of(notes).mailbox is None


@pytest.mark.parametrize("relay", [None, 1, "yes", MemoryMailbox])
def test_a_value_that_is_no_mailbox_is_refused_as_relay(relay: Any) -> None:
    with pytest.raises(ConfigurationError, match="relay must be"):
        durable_app(Notes().server, MemorySessionStore(), relay=relay)


def test_a_mailbox_belongs_to_the_store(store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match="mailbox must be a Mailbox"):
        DurableSessionManager(Notes().server, store, mailbox=MemoryEventLog(MemorySessionStore()))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"mailbox's namespace 'other'.*'default'"):
        DurableSessionManager(Notes().server, store, mailbox=MemoryMailbox(MemorySessionStore(namespace="other")))


async def test_a_manager_closes_the_mailbox_if_asked_to(store: FaultyStore) -> None:
    for close in (False, True):
        manager = DurableSessionManager(Notes().server, store, mailbox=store.mailbox, close_mailbox=close)
        async with manager.run():
            assert store.mailbox.closed == 0
        assert store.mailbox.closed == int(close)


# Servers that share a namespace which neither has set


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about other servers."""
    return [record.getMessage() for record in caplog.records if "share a database" in record.getMessage()]


async def test_a_server_that_shares_a_namespace_with_another_one_says_so_once(
    store: FaultyStore, other_store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store, Notes("ledger"), instance_timeout=2):
        await until(lambda: store.mailbox.background["instances"] == 1)
        async with instance(other_store, Notes("diary"), instance_timeout=2):
            await until(lambda: len(warnings_of(caplog)) == 1)
            assert "the servers 'ledger' and 'diary' share a database and the namespace 'default'" in caplog.text
            await until(lambda: other_store.mailbox.background["beat"] >= 4)
        assert other_store.mailbox.background["instances"] == store.mailbox.background["instances"] == 1
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("names", "namespace"),
    [
        (("notes", "notes"), "default"),
        # FastMCP's own names of servers that have none.
        (("FastMCP-12ab", "notes"), "default"),
        (("notes", "FastMCP-12ab"), "default"),
        (("notes", "ledger"), "mine"),
    ],
)
async def test_servers_that_share_nothing_or_have_no_name_are_not_warned_of(
    names: tuple[str, str], namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemorySessionStore(namespace=namespace)
    one, two = (lone_instance(MemoryMailbox(store), f"one:1:0000000{n}", server=name) for n, name in enumerate(names))
    await one.beat()
    await two.beat()
    await two.find_other_servers()
    assert warnings_of(caplog) == []


async def test_a_server_that_is_silent_is_not_warned_of(
    store: FaultyStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (lone_instance(store.mailbox, f"one:1:0000000{n}", server=name) for n, name in enumerate(("a", "b")))
    await one.beat()
    clock.advance(timedelta(minutes=2))
    await two.beat()
    await two.find_other_servers()
    assert warnings_of(caplog) == []
    await one.beat()
    await two.find_other_servers()
    assert len(warnings_of(caplog)) == 1
