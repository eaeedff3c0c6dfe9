"""Cases of the suite for event logs: heartbeats of instances."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from mcp_session_store.testing.events.suite import LogSuite, MakeLog

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog


class Instances(LogSuite):
    """Heartbeats of instances."""

    async def test_an_instance_that_notes_that_it_runs_is_known_until_it_stops(self, make_log: MakeLog) -> None:
        (_, here), (_, there) = make_log(), make_log()
        names = [uuid.uuid4().hex for _ in range(3)]
        assert await here.last_beats(names) == {}
        assert await here.last_beats([]) == {}
        for name in names[:2]:
            for _ in range(2):
                await there.beat(f"host:1234:{name}")
        beats = await here.last_beats(names)
        assert beats.keys() == set(names[:2])
        assert all(timedelta(0) <= beat.ago < timedelta(minutes=1) for beat in beats.values())
        # They hold nothing, and so nothing of theirs can be released.
        assert not any(beat.released for beat in beats.values())
        for _ in range(2):
            await there.retire(f"host:1234:{names[0]}")
        assert (await here.last_beats(names)).keys() == {names[1]}
        await there.beat(f"host:1234:{names[0]}")
        assert (await here.last_beats(names)).keys() == set(names[:2])

    async def test_a_beat_is_as_old_as_it_is(self, log: EventLog) -> None:
        early, late = uuid.uuid4().hex, uuid.uuid4().hex
        await log.beat(f"host:1:{early}")
        await asyncio.sleep(0.05)
        await log.beat(f"host:1:{late}")
        beats = await log.last_beats([early, late])
        assert beats[early].ago - beats[late].ago > timedelta(milliseconds=20)
        await log.beat(f"host:1:{early}")
        beats = await log.last_beats([early, late])
        assert beats[early].ago <= beats[late].ago

    async def test_what_an_instance_holds_is_not_released_while_it_listens(self, make_log: MakeLog) -> None:
        (_, here), (_, there) = make_log(), make_log()
        name, may_hold = uuid.uuid4().hex, asyncio.Event()
        listening = asyncio.ensure_future(there.listen(lambda _: None, instance=f"host:1:{name}", on_held=may_hold.set))
        # A log that holds nothing does not call it.
        await asyncio.wait({asyncio.ensure_future(may_hold.wait())}, timeout=2)
        assert not listening.done()
        for _ in range(2):
            await there.beat(f"host:1:{name}")
            assert not (await here.last_beats([name]))[name].released
        # It says before it ends that it holds nothing.
        await there.beat(f"host:1:{name}", held=False)
        listening.cancel()
        await asyncio.wait({listening})
        assert listening.cancelled()
        assert not (await here.last_beats([name]))[name].released
        await there.retire(f"host:1:{name}")
        assert await here.last_beats([name]) == {}
