"""A mailbox on a database that breaks: no message is lost, and none is read twice or out of order."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.records import EndReason
from mcp_session_store.sql import SqlMailbox, SqlSessionStore
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import messages_table
from mcp_session_store.testing import new_message, new_session
from mcp_session_store.testing.factories import new_presence
from mcp_session_store.testing.mailbox.suite import peek, places, read_all, run_instances, sweep_messages
from tests.support.databases import behind_proxy, empty, engine_of, execute, settled, sql_store
from tests.support.faults import breaking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from tests.support.faults import FaultProxy

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def mailbox_behind_proxy(url: str, **options: Any) -> AsyncIterator[tuple[SqlMailbox, FaultProxy]]:
    """A mailbox whose database is reached through a network that fails on command, and three instances."""
    async with behind_proxy(url, **options) as (store, proxy), SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2, 3)
        # All statements have been prepared then.
        await mailbox.post([new_message(0, recipient=None, sender=1)])
        for recipient in (2, 3):
            await read_all(mailbox, recipient)
            await mailbox.receive(recipient, delivered={1: 0})
        await settled(store, mailbox)
        yield mailbox, proxy
        await settled(store, mailbox)


def break_next(proxy: FaultProxy, lost: str) -> None:
    if lost == "the answer":
        proxy.kill_on_next_reply(b"SELECT ")
    else:
        proxy.kill_on_next_request()


@pytest.mark.parametrize("lost", ["the statement", "the answer"])
@pytest.mark.parametrize("by_caller", [False, True], ids=["repeated by the mailbox", "repeated by the caller"])
async def test_messages_whose_connection_is_killed_are_stored_once(
    postgres_url: str, lost: str, by_caller: bool
) -> None:
    async with mailbox_behind_proxy(postgres_url) as (mailbox, proxy):
        messages = [
            new_message(1, recipient=2, sender=1),
            new_message(2, recipient=None, sender=1),
            new_message(3, recipient=9, sender=1),
        ]
        if by_caller:
            proxy.refuse()
        break_next(proxy, lost)
        if by_caller:
            with pytest.raises(StoreUnavailable):
                await mailbox.post(messages)
            await proxy.accept()
        assert await mailbox.post(messages) == {9}
        assert proxy.sprung == 1
        assert await peek(mailbox, 2) == [(1, 1), (1, 2)]
        assert await peek(mailbox, 3) == [(1, 2)]


@pytest.mark.parametrize("lost", ["the statement", "the answer"])
@pytest.mark.parametrize("by_caller", [False, True], ids=["repeated by the mailbox", "repeated by the caller"])
async def test_a_page_whose_connection_is_killed_is_read_again(postgres_url: str, lost: str, by_caller: bool) -> None:
    async with mailbox_behind_proxy(postgres_url) as (mailbox, proxy):
        await mailbox.post([new_message(number, recipient=2, sender=1) for number in range(1, 7)])
        page = await mailbox.receive(2, delivered={1: 0}, limit=3)
        assert places(page.messages) == [(1, 1), (1, 2), (1, 3)]
        if by_caller:
            proxy.refuse()
        break_next(proxy, lost)
        if by_caller:
            with pytest.raises(StoreUnavailable):
                await mailbox.receive(2, delivered={1: 3})
            await proxy.accept()
        page = await mailbox.receive(2, delivered={1: 3})
        assert proxy.sprung == 1
        assert places(page.messages) == [(1, 4), (1, 5), (1, 6)]
        await mailbox.receive(2, delivered={1: 6})
        assert await peek(mailbox, 2) == []
        assert await execute(postgres_url, sa.select(messages_table().c.sequence)) == []


@pytest.mark.parametrize("lost", ["the statement", "the answer"])
@pytest.mark.parametrize("by_caller", [False, True], ids=["repeated by the mailbox", "repeated by the caller"])
async def test_heartbeats_stops_and_sweeps_whose_connection_is_killed_take_effect_once(
    postgres_url: str, lost: str, by_caller: bool
) -> None:
    # The answers that say that they have taken effect: of one statement, and of a transaction.
    tags = {"the same number": b"UPDATE 1", "another number": b"COMMIT", "stop": b"COMMIT", "sweep": b"DELETE 5"}
    async with mailbox_behind_proxy(postgres_url) as (mailbox, proxy):
        _, instance, _ = await run_instances(mailbox, 11, 12, 13)

        async def do(what: str) -> object:
            if what == "stop":
                await mailbox.retire(instance)
                return None
            if what == "sweep":
                return (await mailbox.sweep()).gone
            return await mailbox.beat(new_presence(12 if what == "the same number" else 14, instance=instance))

        for what, tag in tags.items():
            if what == "sweep":
                messages = [new_message(number, recipient=13, sender=11) for number in range(5)]
                await mailbox.post(messages)
                await execute(postgres_url, "DELETE FROM mcp_session_instance WHERE number = 13")
            await settled(mailbox)
            sprung = proxy.sprung
            if by_caller:
                proxy.refuse()
            if lost == "the answer":
                proxy.kill_on_next_reply(tag)
            else:
                proxy.kill_on_next_request()
            if by_caller:
                with pytest.raises(StoreUnavailable):
                    await do(what)
                await proxy.accept()
            done = await do(what)
            assert proxy.sprung == sprung + 1
            if what != "sweep":
                assert done is (None if what == "stop" else True)
            running = {one.number: one.waiting for one in await mailbox.instances() if one.number in (12, 13, 14)}
            expected = {"the same number": {12: 0, 13: 0}, "another number": {14: 0, 13: 0}, "stop": {13: 0}}
            assert running == expected.get(what, {})
        assert await execute(postgres_url, sa.select(messages_table().c.sequence)) == []


async def test_each_message_is_read_once_and_in_order_while_connections_break_all_the_time(postgres_url: str) -> None:
    dice = random.Random(4)
    count = 60
    async with behind_proxy(postgres_url, timeout=60) as (store, proxy):
        numbers = (1, 2, 3)
        mailboxes = {number: SqlMailbox(store) for number in numbers}
        for number, mailbox in mailboxes.items():
            await run_instances(mailbox, number)
        read: dict[int, list[tuple[int, int]]] = {number: [] for number in numbers}

        async def send(sender: int) -> None:
            sequence = 0
            while sequence < count:
                size = dice.choice([1, 1, 3])
                batch = [new_message(sequence + place, recipient=None, sender=sender) for place in range(size)]
                while True:
                    try:
                        assert await mailboxes[sender].post(batch) == set()
                        break
                    except StoreUnavailable:
                        pass
                sequence += size

        async def receive(recipient: int) -> None:
            delivered: dict[int, int] = {}
            while len(delivered) < 2 or min(delivered.values()) < count - 1:
                try:
                    page = await mailboxes[recipient].receive(recipient, delivered=delivered, limit=7)
                except StoreUnavailable:
                    continue
                for message in page.messages:
                    assert message.sequence > delivered.get(message.sender, -1)
                    delivered[message.sender] = message.sequence
                read[recipient] += places(page.messages)

        async with breaking(proxy, dice, 0.02), asyncio.timeout(120):
            await asyncio.gather(*map(send, numbers), *map(receive, numbers))
        assert proxy.sprung > 0
        for recipient, messages in read.items():
            for sender in set(numbers) - {recipient}:
                of_sender = [sequence for number, sequence in messages if number == sender]
                assert of_sender == list(range(len(of_sender)))
                assert len(of_sender) >= count
        for mailbox in mailboxes.values():
            await mailbox.aclose()


def inserted(recipient: int, sender: int, sequence: int) -> sa.Insert:
    new = new_message(sequence, recipient=recipient, sender=sender)
    return sa.insert(messages_table()).values(
        recipient=recipient,
        sender=sender,
        sequence=sequence,
        key=new.key,
        kind=new.kind.value,
        bytes=len(new.body),
        created_at=StoreClock(),
        body=new.body,
    )


@pytest.mark.parametrize("outcome", ["COMMIT", "ROLLBACK"])
async def test_a_post_waits_for_a_try_that_is_still_under_way(postgres_url: str, outcome: str) -> None:
    async with sql_store(postgres_url, timeout=60) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        async with engine_of(store).connect() as earlier:
            await earlier.exec_driver_sql("BEGIN")
            await earlier.execute(inserted(2, 1, 5))
            post = asyncio.ensure_future(mailbox.post([new_message(5, recipient=2, sender=1)]))
            await asyncio.wait({post}, timeout=0.3)
            assert not post.done()
            await earlier.exec_driver_sql(outcome)
        assert await post == set()
        assert await peek(mailbox, 2) == [(1, 5)]
        await settled(store, mailbox)


async def test_what_a_try_commits_late_is_not_read_again(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        delivered: dict[int, int] = {}
        await mailbox.post([new_message(5, recipient=2, sender=1)])
        assert places(await read_all(mailbox, 2, delivered)) == [(1, 5)]
        # The first try of the same, which the sender took for lost.
        await mailbox.receive(2, delivered=delivered)
        await execute(postgres_url, inserted(2, 1, 5))
        await mailbox.post([new_message(6, recipient=2, sender=1)])
        assert places(await read_all(mailbox, 2, delivered)) == [(1, 6)]
        await settled(store, mailbox)


async def test_a_receive_waits_for_no_end_of_a_session(postgres_url: str) -> None:
    async with sql_store(postgres_url, timeout=10) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        ended = (await store.create(new_session())).key
        await mailbox.post([new_message(1, recipient=2, sender=1, key=ended), new_message(2, recipient=2, sender=1)])
        delivered: dict[int, int] = {}
        assert places(await read_all(mailbox, 2, delivered)) == [(1, 1), (1, 2)]
        table = messages_table()
        async with engine_of(store).connect() as end:
            await end.exec_driver_sql("BEGIN")
            await end.execute(sa.delete(table).where(table.c.key == ended))
            await mailbox.post([new_message(3, recipient=2, sender=1)])
            assert places(await read_all(mailbox, 2, delivered)) == [(1, 3)]
            await end.exec_driver_sql("COMMIT")
        await mailbox.receive(2, delivered=delivered)
        assert await execute(postgres_url, sa.select(table.c.sequence)) == []
        await settled(store, mailbox)


async def test_an_end_of_a_session_waits_for_no_receive(postgres_url: str) -> None:
    async with sql_store(postgres_url, timeout=10) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        ended = (await store.create(new_session())).key
        await mailbox.post([new_message(1, recipient=2, sender=1, key=ended)])
        async with engine_of(store).connect() as receive:
            await receive.exec_driver_sql("BEGIN")
            await receive.execute(sa.delete(messages_table()))
            assert await store.end(ended, reason=EndReason.CLIENT)
            await receive.exec_driver_sql("COMMIT")
        await settled(store, mailbox)


async def test_ends_posts_receives_and_sweeps_at_once_fail_for_nothing(migrated_url: str) -> None:
    await empty(migrated_url)
    async with sql_store(migrated_url, timeout=60) as store, sql_store(migrated_url, timeout=60) as other:
        mailboxes = {1: SqlMailbox(store), 2: SqlMailbox(other)}
        for number, mailbox in mailboxes.items():
            await run_instances(mailbox, number)
        keys = [(await store.create(new_session())).key for _ in range(30)]

        async def send(sender: int) -> None:
            for number, key in enumerate(3 * keys):
                sequences = 2 * number, 2 * number + 1
                batch = [new_message(sequence, recipient=3 - sender, sender=sender, key=key) for sequence in sequences]
                assert await mailboxes[sender].post(batch) == set()

        async def receive(recipient: int) -> None:
            delivered: dict[int, int] = {}
            while delivered.get(3 - recipient, 0) < 6 * len(keys) - 1:
                await read_all(mailboxes[recipient], recipient, delivered, limit=5)
                await asyncio.sleep(0.001)
            await mailboxes[recipient].receive(recipient, delivered=delivered)

        async def end(of: SqlSessionStore, chosen: list[Any]) -> None:
            for key in chosen:
                assert await of.end(key, reason=EndReason.CLIENT)
                await mailboxes[1].sweep()

        last = (await store.create(new_session())).key
        keys.append(last)  # which does not end, so that the last message of all is read
        ends = end(store, keys[:15]), end(other, keys[15:-1])
        async with asyncio.timeout(120):
            await asyncio.gather(*map(send, mailboxes), *map(receive, mailboxes), *ends)
        await sweep_messages(mailboxes[1])
        for mailbox in mailboxes.values():
            await mailbox.aclose()
        await settled(store, other)


async def test_a_message_of_a_kind_that_only_a_newer_version_knows_is_dropped(migrated_url: str) -> None:
    await empty(migrated_url)
    async with sql_store(migrated_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(number, recipient=2, sender=1) for number in range(3)])
        await execute(migrated_url, "UPDATE mcp_session_message SET kind = 'newer' WHERE sequence > 0")
        page = await mailbox.receive(2, delivered={})
        assert places(page.messages) == [(1, 0)]
        page = await mailbox.receive(2, delivered={1: 0})
        assert (page.messages, page.more) == ([], False)
        assert await execute(migrated_url, "SELECT sequence FROM mcp_session_message") == []
        await settled(store, mailbox)
