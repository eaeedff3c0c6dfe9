"""The section on connections in docs/reference/database.md: its statements are those of an idle process."""

from __future__ import annotations

import re
import sqlite3
from asyncio import selector_events
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store import InstanceSettings
from mcp_session_store.adapter.sweeping import sweep_events, sweep_state
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.listening import HEARTBEAT
from tests.support.asgi import until
from tests.support.databases import migrated
from tests.support.instances import instance
from tests.support.internals import changes_of, instances_of, sweep_store
from tests.support.pages import section_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp_session_store import DurableSessionManager

SECTION = section_of("reference/database.md", "## Connections")
LONG = 36_000.0


class Statements:
    """Counts the statements that are sent to a database, those that begin and commit included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        send, connect = selector_events._SelectorSocketTransport.write, sqlite3.connect  # type: ignore[attr-defined]

        def write(transport: object, data: bytes) -> None:
            # To Postgres: each message is a letter, a length, and as many bytes.
            sent = bytes(data)
            while sent[:1].isalpha():
                self.count += sent[:1] in (b"E", b"Q")  # Execute, or Query
                sent = sent[1 + int.from_bytes(sent[1:5], "big") :]
            send(transport, data)

        def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, **options)
            connection.set_trace_callback(self.note)
            return connection

        monkeypatch.setattr(selector_events._SelectorSocketTransport, "write", write)  # type: ignore[attr-defined]
        monkeypatch.setattr(sqlite3, "connect", traced)

    def note(self, statement: str) -> None:
        self.count += 1


def number(text: str, *, events: bool) -> int:
    """Return the first number of a text; with events, the one that is said to be with them, where there is one."""
    with_events = re.search(r"with `events` (\d+)|(\d+) with `events`", text) if events else None
    return int(next(filter(None, with_events.groups())) if with_events else re.findall(r"\d+", text)[0])


def rows() -> dict[str, tuple[str, float, float]]:
    """Return the rows of the table by their names: statements, and least and most seconds between two times."""
    table = {}
    for line in SECTION.splitlines():
        if match := re.fullmatch(r"\| (.*) \| (.*) \| every ([\d.]+)(?: to ([\d.]+))? s\b.*\|", line):
            name, statements, least, most = match.groups()
            table[name.partition(",")[0].partition(" of the connection")[0]] = (
                statements,
                float(least),
                float(most or least),
            )
    return table


async def sweep(manager: DurableSessionManager) -> None:
    """Sweep as the background tasks do."""
    await sweep_store(manager)
    await instances_of(manager).sweep()
    if manager.event_log is not None:
        await sweep_events(manager.event_log)
    if manager.state_store is not None:
        await sweep_state(manager.state_store)


async def counted(url: str, monkeypatch: pytest.MonkeyPatch, *, events: bool) -> dict[str, int]:
    """Return how many statements each background task of a process with nothing to do sends at a time."""
    await migrated(url)
    sent = Statements(monkeypatch)
    numbers = {}
    async with (
        SqlSessionStore(url, pool_size=1) as store,
        # The background tasks do nothing, once they have begun.
        instance(store, events=events, end_within=LONG, instance_timeout=LONG, sweep_interval=LONG) as one,
    ):
        manager = one.manager
        hears = "postgresql" in url
        await until(lambda: instances_of(manager).mailbox.hears is hears and instances_of(manager).is_entered)
        tasks: dict[str, Callable[[], Awaitable[None]]] = {
            "changes of sessions": changes_of(manager).poll,
            "heartbeat": instances_of(manager).beat,
            "sweep": lambda: sweep(manager),
        }
        await until_quiet(sent)
        for name, work in tasks.items():
            before = sent.count
            await work()
            numbers[name] = sent.count - before
        before = sent.count
        await anyio.sleep(1.2)
        assert sent.count == before
    return numbers


async def until_quiet(sent: Statements) -> None:
    """Wait until all background tasks of a process have begun, and so it sends nothing for a while."""
    for _ in range(20):
        before = sent.count
        await anyio.sleep(1)
        if sent.count == before:
            return
    raise AssertionError("the process does not come to rest")


def in_a_minute(numbers: dict[str, int]) -> float:
    """Return how many statements a minute these are, at the intervals of the table."""
    table = rows()
    return sum(number * 60 / ((table[name][1] + table[name][2]) / 2) for name, number in numbers.items())


@pytest.mark.anyio
@pytest.mark.parametrize("events", [False, True])
async def test_an_idle_process_asks_as_many_statements_as_the_page_says(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, events: bool
) -> None:
    numbers = {**await counted(postgres_url, monkeypatch, events=events), "a sign of life": 1}
    assert {name: number(statements, events=events) for name, (statements, _, _) in rows().items()} == numbers
    total = re.search(r"some (\d+ statements a\s+minute, \d+ with `events`)", SECTION)
    assert total
    assert abs(in_a_minute(numbers) - number(total[1], events=events)) <= 1
    assert in_a_minute(numbers) < 60


@pytest.mark.anyio
async def test_an_idle_process_asks_sqlite_less_than_a_statement_a_second(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = await counted(sqlite_url, monkeypatch, events=True)
    assert min(numbers.values()) > 0
    assert in_a_minute(numbers) < 60


def test_the_page_says_how_often_an_idle_process_asks() -> None:
    settings = InstanceSettings()
    assert settings.sweep_interval is not None
    longest = {
        "changes of sessions": settings.end_within / 2,
        "sweep": settings.sweep_interval,
        "heartbeat": settings.instance_timeout / 3,
    }
    expected = {name: (0.8 * seconds, seconds) for name, seconds in longest.items()}
    expected["a sign of life"] = (HEARTBEAT, HEARTBEAT)
    assert {name: times for name, (_, *times) in rows().items()} == {
        name: pytest.approx(list(times)) for name, times in expected.items()
    }
