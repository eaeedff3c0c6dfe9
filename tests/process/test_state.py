"""State of sessions that many calls write, change and read at once, on workers that are killed in between."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx2
import pytest

from tests.support.clients import sessions, until
from tests.support.http import is_not_handled
from tests.support.keeping import SECRETS
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.http import RawClient
    from tests.support.records import Records

pytestmark = pytest.mark.anyio

SESSIONS = 4
CALLERS = 5
"""Callers of one session at once."""
CALLS = 25
"""Calls of each that are answered."""
KILLS = 4


class Session:
    """A client's session, and what is known of its state.

    Args:
        client: Of the session.
        name: Its name, with which all that it stores begins.
    """

    def __init__(self, client: RawClient, name: str) -> None:
        self.client = client
        self.name = name
        self.added: set[str] = set()
        """Marks that were added, as an answer said."""
        self.tried: set[str] = set()
        """Marks that a call was to add."""
        self.noted: dict[str, set[str | None]] = {}
        """What each note may hold: that of the last answer, and of later calls without one."""
        self.hidden: set[str] = set()
        self.hiding: set[str] = set()
        self.answers = 0

    async def call(self, tool: str, **arguments: Any) -> str | None:
        """Call a tool, and return what it answers; `None`: no answer came."""
        try:
            answer = await self.client.call_tool(tool, arguments)
        except httpx2.TransportError:
            return None
        if answer.status in (502, 503) or is_not_handled(answer) or not answer.messages:
            return None
        assert answer.status == 200, answer
        assert not answer.result.get("isError"), answer
        self.answers += 1
        return answer.text

    async def add(self, mark: str) -> bool:
        self.tried.add(mark)
        before = set(self.added)
        text = await self.call("add", mark=mark)
        if text is None:
            return False
        self.added.add(mark)
        self.check_marks(json.loads(text), at_least={*before, mark})
        return True

    async def note(self, name: str, value: str) -> bool:
        may_hold = self.noted.setdefault(name, {None})
        may_hold.add(value)
        text = await self.call("note", name=name, text=value)
        if text is None:
            return False
        assert json.loads(text) == value
        self.noted[name] = {value}
        return True

    async def read(self, name: str) -> bool:
        before = set(self.added)
        text = await self.call("read", names=[name])
        if text is None:
            return False
        found = json.loads(text)
        assert found[name] in self.noted.get(name, {None})
        self.check_marks(found["marks"] or [], at_least=before)
        return True

    async def hide(self, name: str) -> bool:
        self.hiding.add(name)
        if await self.call("hide", name=name) is None:
            return False
        self.hidden.add(name)
        return True

    def check_marks(self, marks: list[str], *, at_least: set[str]) -> None:
        assert len(marks) == len(set(marks))
        assert at_least <= set(marks) <= self.tried

    async def hides(self) -> set[str]:
        """Return which tools are hidden."""
        answer = await self.client.request("tools/list")
        return set(SECRETS) - {tool["name"] for tool in answer.result["tools"]}


async def use(session: Session, caller: int, *, hides: bool) -> None:
    """Change and read the state of a session, until so many calls are answered."""
    done, tries = 0, 0
    while done < CALLS:
        tries += 1
        assert tries < 20 * CALLS
        name = f"note {caller}"
        match done % 5:
            case 0 | 2:
                is_answered = await session.add(f"{session.name} {caller} {tries}")
            case 1:
                is_answered = await session.note(name, f"{session.name} {caller} {tries}")
            case 3 if hides and caller < 2:
                # Two callers at once, and no session hides what the next one hides.
                number = int(session.name) + 2 * caller + (done // 5) % 2
                is_answered = await session.hide(SECRETS[number % len(SECRETS)])
            case _:
                is_answered = await session.read(name)
        done += is_answered
        if not is_answered:
            await anyio.sleep(0.05)


async def answered(used: list[Session], calls: int) -> None:
    """Wait until so many calls are answered."""
    await until(lambda: sum(session.answers for session in used) >= calls, f"{calls} calls are answered", within=60)


@pytest.mark.parametrize("framework", ["mcpserver", "fastmcp"])
async def test_nothing_is_lost_of_what_many_calls_change_while_workers_die(
    application: Application, store_url: str, records: Records, framework: str
) -> None:
    keeping = f"tests.support.keeping:{framework}"
    servers = [application.serve(store_url, keeping, end_within=0.5) for _ in range(2)]
    dice = random.Random(18)
    async with (
        RoundRobinProxy([server.port for server in servers], dice=dice) as proxy,
        sessions(proxy.mcp_url, SESSIONS) as clients,
    ):
        used = [Session(client, str(number)) for number, client in enumerate(clients)]
        async with anyio.create_task_group() as group:
            for session in used:
                for caller in range(CALLERS):
                    group.start_soon(partial(use, session, caller, hides=framework == "fastmcp"))
            for kill in range(1, KILLS + 1):
                await answered(used, kill * SESSIONS * CALLERS * CALLS // (KILLS + 1))
                await anyio.to_thread.run_sync(servers[kill % 2].restart)

        for session in used:
            # Each time on any worker.
            for _ in range(4):
                for caller in range(CALLERS):
                    assert await session.read(f"note {caller}")
            if framework == "fastmcp":
                assert session.hidden

                async def all_hidden(session: Session = session) -> bool:
                    seen = [await session.hides() for _ in range(4)]
                    assert all(one <= session.hiding for one in seen)
                    return all(session.hidden <= one for one in seen)

                await until(all_hidden, "what was hidden is hidden everywhere")
        assert await records.rows("mcp_session_state") > SESSIONS
        for client in clients:
            assert (await client.delete()).status == 200
        assert await records.rows("mcp_session_state") == 0
        assert await records.rows("mcp_session_value") == 0
