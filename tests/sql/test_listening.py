"""A store, an event log and a mailbox hear of their database on one connection, whichever of them come and go."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from mcp_session_store.errors import StoreClosed, StoreUnavailable
from mcp_session_store.records import EndReason
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore
from mcp_session_store.sql.dialects.advisory_locks import LOCK_CLASS
from mcp_session_store.sql.listening import PROBE_CHANNEL
from mcp_session_store.testing import new_event, new_session
from mcp_session_store.testing.factories import new_message, new_presence
from tests.support.databases import execute, migrated, settled
from tests.support.internals import database_of, listening_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

pytestmark = pytest.mark.anyio

NAME = "hears"
KINDS = ("store", "log", "mailbox")
LOCKS = (
    f"SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = {LOCK_CLASS} "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
LOSE = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{NAME}'"


@dataclass
class Trio:
    """A store, a log and a mailbox of one database, and what they hear."""

    url: str
    store: SqlSessionStore
    log: SqlEventLog
    mailbox: SqlMailbox

    def __post_init__(self) -> None:
        self.presence = new_presence(7)
        self.hinted = {kind: asyncio.Event() for kind in KINDS}
        self.held = asyncio.Event()

    def call(self, kind: str) -> Coroutine[object, object, None]:
        hint = self.hinted[kind].set
        if kind == "store":
            return self.store.listen(lambda _: hint())
        if kind == "log":
            return self.log.listen(lambda _: hint())
        return self.mailbox.listen(hint, instance=self.presence.instance, number=7, on_held=self.held.set)

    def listen(self, *kinds: str) -> list[asyncio.Task[None]]:
        return [asyncio.ensure_future(self.call(kind)) for kind in kinds]

    async def hear(self, *kinds: str) -> None:
        """Wait for a hint of each."""
        async with asyncio.timeout(20):
            for kind in kinds:
                await self.hinted[kind].wait()
                self.hinted[kind].clear()

    async def change(self, *kinds: str) -> None:
        """Have another process make a change of each kind."""
        async with SqlSessionStore(self.url) as store, SqlEventLog(store) as log, SqlMailbox(store) as mailbox:
            key = (await store.create(new_session())).key
            if "mailbox" in kinds:
                await mailbox.beat(self.presence)
                await mailbox.post([new_message(next(SEQUENCES), recipient=7, sender=1)])
            if "log" in kinds:
                await log.append(key, [new_event(0)])
                await log.follow([key])
                await log.append(key, [new_event(1)])
            if "store" in kinds:
                await store.end(key, reason=EndReason.CLIENT)
            await settled(store)

    async def hears_changes_only(self, *kinds: str) -> None:
        for event in self.hinted.values():
            event.clear()
        await self.change(*KINDS)
        await self.hear(*kinds)
        assert not any(event.is_set() for event in self.hinted.values())

    async def frees_its_locks(self) -> None:
        """Wait until no lock is held: the database frees those of a closed connection a little later."""
        async with asyncio.timeout(20):
            while await execute(self.url, LOCKS):
                await asyncio.sleep(0.02)

    async def takes(self, *counts: int) -> None:
        """Wait until the number of connections is one of these: the database ends a closed one a little later."""
        async with asyncio.timeout(20):
            while len(await execute(self.url, ACTIVITY)) not in counts:
                await asyncio.sleep(0.02)


SEQUENCES = itertools.count(1)
ACTIVITY = f"SELECT pid FROM pg_stat_activity WHERE application_name = '{NAME}'"


@asynccontextmanager
async def trio(url: str) -> AsyncIterator[Trio]:
    await migrated(url)
    async with SqlSessionStore(f"{url}?application_name={NAME}", pool_size=1) as store:
        async with SqlEventLog(store) as log, SqlMailbox(store) as mailbox:
            yield Trio(url, store, log, mailbox)
        await settled(store)


async def cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)


async def test_a_store_a_log_and_a_mailbox_hear_on_one_connection(postgres_url: str) -> None:
    async with trio(postgres_url) as three:
        listening = three.listen(*KINDS)
        await three.hear(*KINDS)
        assert three.held.is_set()
        assert three.mailbox.hears
        await three.takes(2)
        await three.hears_changes_only(*KINDS)
        await cancel(*listening)
        await three.takes(1)


async def test_one_that_leaves_hears_no_more_and_holds_no_lock_while_the_others_go_on(postgres_url: str) -> None:
    async with trio(postgres_url) as three:
        *others, of_mailbox = three.listen(*KINDS)
        for _ in range(2):
            await three.hear("mailbox")
            assert len(await execute(postgres_url, LOCKS)) == 1
            await cancel(of_mailbox)
            assert not three.mailbox.hears
            await three.frees_its_locks()
            await three.hear("store", "log")
            await three.hears_changes_only("store", "log")
            for kind in ("store", "log"):
                three.hinted[kind].set()
            await three.takes(2)
            [of_mailbox] = three.listen("mailbox")
        await three.hear("mailbox")
        await cancel(*others, of_mailbox)


async def test_those_that_come_and_go_at_any_moment_disturb_no_other(postgres_url: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    async with trio(postgres_url) as three:
        for stays in (None, "store", "mailbox"):
            staying = three.listen(stays) if stays is not None else []
            for _ in range(40):
                coming = three.listen(*(chance.choice(KINDS) for _ in range(chance.randrange(1, 5))))
                while coming:
                    for _ in range(chance.randrange(60)):
                        await asyncio.sleep(0)
                    if chance.random() < 0.1:
                        await asyncio.sleep(0.01)
                    await cancel(coming.pop(chance.randrange(len(coming))))
            if stays is not None:
                await three.hear(stays)
                await three.hears_changes_only(stays)
                await three.takes(2)
                await cancel(*staying)
            async with asyncio.timeout(20):
                while listening_of(three.store) or database_of(three.store).closing:
                    await asyncio.sleep(0.01)
            # One for queries, unless its last statement was cancelled.
            await three.takes(0, 1)
            await three.frees_its_locks()


async def test_a_lost_connection_ends_all_and_they_hear_on_one_again(postgres_url: str) -> None:
    async with trio(postgres_url) as three:
        for _ in range(2):
            listening = three.listen(*KINDS)
            await three.hear(*KINDS)
            await execute(postgres_url, LOSE)
            await asyncio.wait(listening, timeout=20)
            assert not three.mailbox.hears
            errors = [task.exception() for task in listening]
            assert all(isinstance(error, StoreUnavailable) for error in errors)
            assert len({id(error) for error in errors}) == 3
        listening = three.listen(*KINDS)
        await three.hear(*KINDS)
        await three.takes(2)
        await three.hears_changes_only(*KINDS)
        await cancel(*listening)


@pytest.mark.parametrize("order", list(itertools.permutations(KINDS)))
async def test_they_are_closed_in_any_order(postgres_url: str, order: tuple[str, ...]) -> None:
    async with trio(postgres_url) as three:
        listening = dict(zip(KINDS, three.listen(*KINDS), strict=True))
        await three.hear(*KINDS)
        closing = {"store": three.store, "log": three.log, "mailbox": three.mailbox}
        for kind in order:
            await closing[kind].aclose()
            await asyncio.sleep(0)
            # Log and mailbox lie beside the store, whose end is theirs.
            ended = list(listening) if kind == "store" else [kind] if kind in listening else []
            for one in ended:
                with pytest.raises(StoreClosed):
                    await asyncio.wait_for(listening.pop(one), 20)
            assert not any(task.done() for task in listening.values())
        await three.takes(0)
        assert listening_of(three.store) == set()


async def test_a_channel_may_be_added_while_the_probe_is_under_way(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up = sa.select(
        sa.func.pg_advisory_xact_lock(1), sa.func.pg_notify(PROBE_CHANNEL.name, sa.bindparam("payload", type_=sa.Text))
    )
    monkeypatch.setattr(PROBE_CHANNEL, "send", held_up)
    waits = (
        "SELECT count(*) FROM pg_stat_activity "
        f"WHERE application_name = '{NAME}' AND datname = current_database() AND wait_event = 'advisory'"
    )
    holder = await asyncpg.connect(make_url(postgres_url).set(drivername="postgresql").render_as_string(False))
    async with trio(postgres_url) as three:
        try:
            await holder.execute("SELECT pg_advisory_lock(1)")
            listening = three.listen("store")
            async with asyncio.timeout(20):
                while not await holder.fetchval(waits):
                    await asyncio.sleep(0.01)
            leaving = three.listen("log")
            listening += three.listen("log", "mailbox")
            await asyncio.sleep(0.02)
            assert not any(event.is_set() for event in three.hinted.values())
        finally:
            await holder.close()
        await cancel(*leaving)
        await three.hear(*KINDS)
        await three.takes(2)
        await cancel(*listening)


async def test_a_callback_that_fails_ends_its_own_call_only(postgres_url: str) -> None:
    def fail(_: object) -> None:
        raise ValueError("a bug")

    async with trio(postgres_url) as three:
        listening = three.listen(*KINDS)
        await three.hear(*KINDS)
        with pytest.raises(ValueError, match="a bug"):
            await asyncio.wait_for(three.store.listen(fail), 20)
        await three.hears_changes_only(*KINDS)
        await cancel(*listening)


async def test_a_log_with_a_url_of_its_own_has_a_connection_of_its_own(postgres_url: str) -> None:
    async with trio(postgres_url) as three, SqlEventLog(f"{postgres_url}?application_name={NAME}") as log:
        heard = asyncio.Event()
        listening = [*three.listen(*KINDS), asyncio.ensure_future(log.listen(lambda _: heard.set()))]
        await three.hear(*KINDS)
        await asyncio.wait_for(heard.wait(), 20)
        await three.takes(4)
        await three.store.aclose()
        assert not listening[-1].done()
        await cancel(listening.pop())
        await asyncio.wait(listening)
        for task in listening:
            with contextlib.suppress(StoreClosed):
                task.result()
