"""Cases of the suite for mailboxes: heartbeats of instances, and what they say of themselves."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from mcp_session_store.mailbox import Mailbox, Presence
from mcp_session_store.testing.factories import new_message, new_presence
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, run_instances


class Instances(MailboxSuite):
    """Heartbeats of instances, and what they say of themselves."""

    async def test_an_instance_is_known_until_it_stops(self, make_mailbox: MakeMailbox) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox()
        names = [uuid.uuid4().hex for _ in range(3)]
        assert await here.last_beats(names) == {}
        assert await here.last_beats([]) == {}
        for number, name in enumerate(names[:2], 1):
            for _ in range(2):
                assert await there.beat(new_presence(number, instance=f"host:1234:{name}"))
        beats = await here.last_beats(names)
        assert beats.keys() == set(names[:2])
        assert all(timedelta(0) <= beat.ago < timedelta(minutes=1) for beat in beats.values())
        # They hold nothing, and so nothing of theirs can be released.
        assert not any(beat.released for beat in beats.values())
        for _ in range(2):
            await there.retire(f"host:1234:{names[0]}")
        assert (await here.last_beats(names)).keys() == {names[1]}
        assert await there.beat(new_presence(1, instance=f"host:1234:{names[0]}"))
        assert (await here.last_beats(names)).keys() == set(names[:2])

    async def test_the_age_of_a_heartbeat_is_the_time_since_it(self, mailbox: Mailbox) -> None:
        early, late = new_presence(1), new_presence(2)
        names = [presence.instance.rpartition(":")[2] for presence in (early, late)]
        await mailbox.beat(early)
        await asyncio.sleep(0.05)
        await mailbox.beat(late)
        beats = await mailbox.last_beats(names)
        assert beats[names[0]].ago - beats[names[1]].ago > timedelta(milliseconds=20)
        await mailbox.beat(early)
        beats = await mailbox.last_beats(names)
        assert beats[names[0]].ago <= beats[names[1]].ago

    async def test_instances_are_listed_with_what_they_say_of_themselves(self, make_mailbox: MakeMailbox) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox()
        assert await here.instances() == []
        before = datetime.now(UTC)
        first = new_presence(7, server="server", version="1.2.3", residents=5, streams=2)
        assert await there.beat(first)
        [running] = await here.instances()
        assert _presence(running) == first
        assert abs(running.started_at - before) < timedelta(minutes=1)
        assert timedelta(0) <= running.heartbeat.ago < timedelta(minutes=1)
        assert not running.heartbeat.released
        assert running.waiting == 0
        later = replace(first, residents=0, streams=9)
        assert await there.beat(later)
        [again] = await here.instances()
        assert _presence(again) == later
        assert again.started_at == running.started_at

    async def test_instances_are_listed_the_oldest_first(self, mailbox: Mailbox) -> None:
        ids = []
        for number in (30, 10, 20):
            ids += await run_instances(mailbox, number)
            await asyncio.sleep(0.02)
        assert [running.instance for running in await mailbox.instances()] == ids
        await mailbox.retire(ids[1])
        assert [running.instance for running in await mailbox.instances()] == [ids[0], ids[2]]

    async def test_an_instance_is_listed_with_the_number_of_messages_that_wait(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, None)
        await mailbox.post([new_message(sequence, recipient=2, sender=1) for sequence in range(3)])
        assert {running.number: running.waiting for running in await mailbox.instances()} == {1: 0, 2: 3, None: 0}
        await mailbox.receive(2, delivered={1: 1})
        assert {running.number: running.waiting for running in await mailbox.instances()} == {1: 0, 2: 1, None: 0}

    async def test_what_an_instance_holds_is_not_released_while_it_listens(self, make_mailbox: MakeMailbox) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox()
        presence, may_hold = new_presence(1), asyncio.Event()
        name = presence.instance.rpartition(":")[2]
        listening = asyncio.ensure_future(
            there.listen(lambda: None, instance=presence.instance, number=1, on_held=may_hold.set)
        )
        # A mailbox that holds nothing does not call it.
        await asyncio.wait({asyncio.ensure_future(may_hold.wait())}, timeout=2)
        assert not listening.done()
        for _ in range(2):
            assert await there.beat(presence)
            assert not (await here.last_beats([name]))[name].released
        # It says before it ends that it holds nothing.
        assert await there.beat(replace(presence, held=False))
        listening.cancel()
        await asyncio.wait({listening})
        assert listening.cancelled()
        assert not (await here.last_beats([name]))[name].released
        await there.retire(presence.instance)
        assert await here.last_beats([name]) == {}


def _presence(running: object) -> Presence:
    fields = ("instance", "number", "server", "version", "residents", "streams")
    return Presence(**{name: getattr(running, name) for name in fields})
