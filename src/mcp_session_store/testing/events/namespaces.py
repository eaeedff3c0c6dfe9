"""Cases of the suite for event logs: separation of the events of different namespaces."""

from __future__ import annotations

from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all, sweep_events
from mcp_session_store.testing.factories import new_event


class Namespaces(LogSuite):
    """Separation of the events of different namespaces."""

    async def test_logs_of_one_namespace_see_the_same_events(self, make_log: MakeLog) -> None:
        (store, here), (_, there) = make_log(), make_log()
        key = await self._opened(store)
        first = await here.append(key, [new_event(0)])
        assert first is not None
        assert await there.append(key, [new_event(1)]) == first + 1
        assert await read_all(here, key) == await read_all(there, key)
        assert await here.heads([key]) == {key: first + 1}

    async def test_the_events_of_another_namespace_do_not_exist(self, make_log: MakeLog) -> None:
        (_, mine), (their_store, theirs) = make_log("mine"), make_log("theirs")
        assert (mine.namespace, theirs.namespace) == ("mine", "theirs")
        key = await self._opened(their_store)
        await self._assert_gone(mine, key)
        await theirs.append(key, [new_event(0)])
        await self._assert_gone(mine, key)
        await mine.follow([key])
        assert await mine.append(key, [new_event(0)], again=True) is None
        assert [event.position for event in await read_all(theirs, key)] == [0]
        await self.age_events(theirs, key)
        assert await sweep_events(mine) == 0
        assert await sweep_events(theirs) == 1
