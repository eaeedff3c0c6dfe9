"""Many questions, answers and cancellations through a load balancer, with a verdict on each of them."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import anyio

from tests.support.questions import STEPS, Notes
from tests.support.respondents import Wire, respondent

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from tests.support.faults import FaultProxy
    from tests.support.postgres import PostgresServer
    from tests.support.questions import Note
    from tests.support.respondents import ClientKind, Respondent
    from tests.support.servers import ServerProcess

KINDS: Final = ("elicit", "sample", "error", "roots", "progress", "wait")
"""What is tried: questions by the tool that asks them, errors as answers, and the call that is cancelled."""


@dataclass
class Verdicts:
    """Numbers of what was tried, by what became of it."""

    asked: int = 0
    arrived: int = 0

    def __str__(self) -> str:
        counts = {one.name: getattr(self, one.name) for one in fields(self)}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count or name in ("asked", "arrived"))


@dataclass
class Tally(Verdicts):
    """What became of the calls of one kind. Each counts once, below `asked`."""

    arrived: int = 0
    """The answer came to the call that had asked, or the call was cancelled."""
    lost: int = 0
    """The client got 202, the process that was waiting lived, and nothing arrived."""
    wrong: int = 0
    """The answer was another one's, or was incomplete."""
    repeated: int = 0
    """Something arrived twice."""
    disordered: int = 0
    """Progress that one process was sent arrived in another order."""
    overtaken: int = 0
    """Progress did not arrive before the answer, which was posted to another process. So it may be in an outage."""
    died: int = 0
    """The process in which the call ran was killed."""
    unsent: int = 0
    """The client did not get 202 for the answer, or never sent it."""
    not_begun: int = 0
    """The call did not reach the server, or its client could not connect."""
    elsewhere: int = 0
    """Part of `arrived`: posted to another process than the one that was waiting."""


class Trial:
    """Clients that call the tools of `tests.support.questions` by a URL.

    Args:
        url: URL of a load balancer in front of processes of the server.
        notes: File of the server's notes.
        dice: Decides the order of the calls.
        patience: Seconds that a call may take.
    """

    def __init__(self, url: str, notes: Path, dice: random.Random, *, patience: float) -> None:
        self.wire = Wire()
        self.killed: dict[int, float] = {}
        """Times at which processes were killed."""
        self.failures: Counter[str] = Counter()
        """What clients raised."""
        self.url = url
        self.notes = Notes(notes)
        self._dice = dice
        self._patience = patience
        self._expected: dict[str, str] = {}
        self._cancelled: set[str] = set()
        self._jobs: list[str] = []
        self._number = 0

    @property
    def left(self) -> int:
        """Number of calls that have not begun."""
        return len(self._jobs)

    async def run(
        self, counts: Mapping[str, int], *, clients: int, client_kinds: Sequence[ClientKind] = ("official",)
    ) -> None:
        """Make so many calls of each kind, in random order, by so many clients at once."""
        self._jobs = [kind for kind, count in counts.items() for _ in range(count)]
        self._dice.shuffle(self._jobs)
        async with anyio.create_task_group() as group:
            for number in range(clients):
                group.start_soon(self._work, client_kinds[number % len(client_kinds)])

    async def _work(self, client_kind: ClientKind) -> None:
        while self._jobs:
            self._number += 1
            name = f"client {self._number}"
            # Until a client has failed, it makes one call after the other.
            token = self._next(name)
            try:
                async with respondent(self.url, name, self.wire, client_kind) as client:
                    while True:
                        await self.call(client, token)
                        if not self._jobs:
                            break
                        token = self._next(name)
            except Exception as error:
                self.failures[shown(error)] += 1

    def _next(self, name: str) -> str:
        token = f"{self._jobs.pop()}-{secrets.token_hex(8)}"
        self._expected[token] = f"{name} {token}"
        return token

    async def call(self, client: Respondent, token: str) -> None:
        """Make a call, whatever comes of it."""
        self._expected[token] = client.expected(token)
        client.before_answer = self._progress_arrived
        with anyio.move_on_after(self._patience) as scope:
            if token.startswith("wait"):
                await client.cancel(token)
                # It ends with the session, too.
                while not any(note.what == "cancelled" for note in self.notes.of(token)):
                    await anyio.sleep(0.02)
                self._cancelled.add(token)
            else:
                await client.ask(token)
        if scope.cancelled_caught:
            self.failures["no result in time"] += 1

    async def _progress_arrived(self, token: str) -> None:
        """Wait for the progress with a question, so that no answer overtakes it which goes another way."""

        def has_arrived() -> bool:
            posted = self.wire.progress.get(token, [])
            accepted = {f"{step}" for step, one in posted if one.accepted}
            arrived = {note.value.partition(" ")[0] for note in self.notes.of(token) if note.what == "progress"}
            return len(posted) == len(STEPS) and all(one.status for _, one in posted) and accepted <= arrived

        if token.startswith("progress"):
            with anyio.move_on_after(self._patience / 3):
                while not has_arrived():
                    await anyio.sleep(0.02)

    async def settled(self, *, within: float) -> None:
        """Wait until all has arrived that is accepted now.

        Args:
            within: Seconds.
        """
        accepted = [token for token in self._expected if self._verdict(token, self.notes.of(token)) == "lost"]
        with anyio.move_on_after(within):
            while any(self._verdict(token, self.notes.of(token)) == "lost" for token in accepted):
                await anyio.sleep(0.1)

    async def tallies(self, *, within: float = 0.0) -> dict[str, Tally]:
        """Return what became of all calls, by kind.

        Args:
            within: Seconds in which what was accepted may still arrive.
        """
        with anyio.move_on_after(within):
            while any(tally.lost for tally in self._tallies().values()):
                await anyio.sleep(0.2)
        return self._tallies()

    def _tallies(self) -> dict[str, Tally]:
        tallies: dict[str, Tally] = {}
        for token in self._expected:
            tally = tallies.setdefault(token.partition("-")[0], Tally())
            tally.asked += 1
            notes = self.notes.of(token)
            verdict = self._verdict(token, notes)
            setattr(tally, verdict, getattr(tally, verdict) + 1)
            if verdict == "arrived":
                posted = (self.wire.cancellations if token.startswith("wait") else self.wire.answers).get(token)
                tally.elsewhere += posted is not None and posted.pid != notes[0].pid
        return tallies

    def _verdict(self, token: str, notes: Sequence[Note]) -> str:
        if not notes:
            return "not_begun"
        if token.startswith("wait"):
            posted = self.wire.cancellations.get(token)
            if token in self._cancelled:
                return "arrived"
        else:
            posted = self.wire.answers.get(token)
            values = [note.value for note in notes if note.what == "answered"]
            if len(values) > 1:
                return "repeated"
            if self._expected[token] in values or (values and token.startswith("whoami")):
                return self._progress_verdict(token, notes) if token.startswith("progress") else "arrived"
            # Else the call has ended with an error, because its client was gone.
            if values and values[0] in self._expected.values():
                return "wrong"
        if notes[0].pid in self.killed:
            return "died"
        return "lost" if posted is not None and posted.accepted else "unsent"

    def _progress_verdict(self, token: str, notes: Sequence[Note]) -> str:
        """Judge the progress of a call that was answered."""
        noted = [note.value.split() for note in notes if note.what == "progress"]
        steps = [int(step) for step, _ in noted]
        if {said for _, said in noted} - {token}:
            return "wrong"
        if len(steps) != len(set(steps)):
            return "repeated"
        posted = self.wire.progress[token]
        missing = {one.pid for step, one in posted if one.accepted and step not in steps}
        # Between two senders there is no order.
        if self.wire.answers[token].pid in missing:
            return "lost"
        if missing:
            return "overtaken"
        for pid in {one.pid for _, one in posted}:
            of_sender = [step for step in steps if (step, pid) in {(step, one.pid) for step, one in posted}]
            if of_sender != sorted(of_sender):
                return "disordered"
        return "arrived" if set(steps) == set(STEPS) else "unsent"


class Faults:
    """Processes and databases that go away while a trial runs, one at a time.

    Args:
        trial: The trial, which learns what was killed.
        dice: Says what and when.
        longest_pause: Seconds from one to the next.
    """

    def __init__(self, trial: Trial, dice: random.Random, *, longest_pause: float) -> None:
        self.kills = 0
        self._trial = trial
        self._dice = dice
        self._longest_pause = longest_pause

    async def kill(self, servers: Sequence[ServerProcess]) -> None:
        """Kill one of the processes, and start it again."""
        await self._pause()
        server = self._dice.choice(servers)
        self._trial.killed[server.pid] = time.time()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.restart)
        self.kills += 1

    async def restart_database(self, postgres: PostgresServer, *, seconds: float) -> None:
        """Stop the database for so many seconds, as a crash does."""
        await self._pause()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(postgres.stop, "immediate")
            await anyio.sleep(seconds)
            await anyio.to_thread.run_sync(postgres.start)
            # What was accepted meanwhile dies with the process that accepted it.
            await anyio.sleep(2)
            await self._trial.settled(within=20)

    async def cut(self, network: FaultProxy, *, seconds: float) -> None:
        """Cut what is behind a network from the database for so many seconds."""
        await self._pause()
        network.refuse()
        network.kill_connections()
        await anyio.sleep(seconds)
        await network.accept()

    async def _pause(self) -> None:
        await anyio.sleep(self._dice.uniform(0.5, 1) * self._longest_pause)


@asynccontextmanager
async def meanwhile(faults: Iterable[Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    """Have faults happen, one after the other, until the context ends."""

    async def happen() -> None:
        for fault in faults:
            await fault()

    async with anyio.create_task_group() as group:
        group.start_soon(happen)
        yield
        group.cancel_scope.cancel()


def shown(error: BaseException) -> str:
    """Return the first error of a group in a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:120]
