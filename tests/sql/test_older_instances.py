"""A rolling deploy: instances of the version before, which know no mailbox, beside those that have one."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.mailbox import MessageKind, NewMessage, Presence
from mcp_session_store.sql import SqlMailbox, SqlSessionStore
from mcp_session_store.testing import new_session
from tests.support.databases import age_instance, execute, migrated
from tests.support.instances import lone_instance
from tests.support.rows import insert_events

if TYPE_CHECKING:
    from uuid import UUID

pytestmark = pytest.mark.anyio

OLD, NEW = "0000000a", "0000000b"


def message(key: UUID, sequence: int, recipient: int | None) -> NewMessage:
    """A message to one instance, or to all."""
    return NewMessage(recipient=recipient, sender=9, sequence=sequence, key=key, kind=MessageKind.CANCELLED, body="{}")


async def test_heartbeats_of_the_version_before_are_judged_and_it_is_sent_nothing(database_url: str) -> None:
    await migrated(database_url)
    async with SqlSessionStore(database_url) as store, SqlMailbox(store) as mailbox:
        one = lone_instance(mailbox, f"host:1:{NEW}", dead_after=timedelta(minutes=1))
        await one.beat()
        await insert_events(database_url, [], beats={f"host:2:{OLD}": timedelta(0)})
        one.reliable_since = -math.inf
        assert await one.find_dead([OLD, "0000000c"]) == ["0000000c"]
        old, new = sorted(await mailbox.instances(), key=lambda row: row.instance, reverse=True)
        assert (old.instance, old.number, old.server, old.version, old.residents, old.streams) == (
            f"host:2:{OLD}",
            None,
            "",
            "",
            0,
            0,
        )
        assert new.number is not None
        # The older one stores no name of a server, and so causes no warning of a shared namespace.
        await one.find_other_servers()
        key = (await store.create(new_session())).key
        assert await mailbox.post([message(key, 1, None), message(key, 2, new.number)]) == set()
        page = await mailbox.receive(new.number, delivered={})
        assert [waiting.sequence for waiting in page.messages] == [1, 2]
        assert sum(row.waiting for row in await mailbox.instances()) == 2
        await age_instance(mailbox, f"host:2:{OLD}", timedelta(minutes=2))
        assert await one.find_dead([OLD]) == [OLD]


async def test_the_version_before_finds_what_it_reads_of_an_instance_with_a_mailbox(database_url: str) -> None:
    await migrated(database_url)
    async with SqlSessionStore(database_url) as store, SqlMailbox(store) as mailbox:
        await mailbox.beat(Presence(instance=f"host:2:{NEW}", number=7))
        rows = await execute(database_url, "SELECT name, instance, beat_at, lock_epoch FROM mcp_session_instance")
        assert [(row.name, row.instance, row.lock_epoch) for row in rows] == [(NEW, f"host:2:{NEW}", None)]
        assert rows[0].beat_at is not None
        # It sweeps by the heartbeat alone.
        await age_instance(mailbox, f"host:2:{NEW}", timedelta(days=2))
        assert (await mailbox.sweep()).instances == 1
