"""Much that servers say on their clients' own streams, while these break and move, with a verdict on each message."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
from mcp import MCPError
from mcp_types import CONNECTION_CLOSED

from tests.support.respondents import Posted, respondent
from tests.support.trial import Trial, Verdicts, shown

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.support.questions import Note
    from tests.support.respondents import ClientKind, Respondent
    from tests.support.stream_proxy import Opening, StreamProxy

STREAM_KINDS: Final = ("changed", "updated", "log", "asked")
"""What is tried: changed lists, updated resources, messages of a log, and questions outside of calls."""

SOON: Final = 1.0
"""Seconds after which what was said has been given to a stream that is open, or stored by the process that said it."""
CLOSED_WITHIN: Final = 3.0
"""Seconds after which an older stream is closed when a newer one is open: the store is told, and the older holder."""
LINGERS: Final = 8.0
"""Seconds for which the load balancer holds a connection open whose client has gone."""
DEAF_AFTER: Final = 10.0
"""Seconds after which a client that has no stream open has given up."""


@dataclass
class StreamTally(Verdicts):
    """What became of the messages of one kind. Each counts once, below `asked`."""

    arrived: int = 0
    """The client got it once; a question was answered, too."""
    lost: int = 0
    """It came nowhere, although no connection was broken and the process that said it lived."""
    repeated: int = 0
    """It came twice, or without an event log to two streams of the client."""
    wrong: int = 0
    """It came to another client, or with another answer."""
    broken: int = 0
    """It went to a connection that was broken at that moment, and there is no event log."""
    died: int = 0
    """The process that said it was killed a moment later; or, of a question, before the answer came."""
    not_begun: int = 0
    """The server was not told to say it."""
    unheard: int = 0
    """Its client had given up its stream, or its session."""
    elsewhere: int = 0
    """Part of `arrived`: on the stream of another process than the one that had said it."""


class StreamTrial(Trial):
    """Clients that have the server of `tests.support.questions` speak on their streams.

    Args:
        proxy: The load balancer.
        notes: File of the server's notes.
        dice: Decides the order of the messages, and which streams are broken.
        has_events: Whether an event log keeps what is said.
        pause: Seconds at most between two messages of a client.
        cut_every: Seconds at most after which a client of the restless half loses its stream again. Streams that are
            taken over five times within ten seconds are refused.
        lingers: Seconds, one of which goes by before a process learns that a stream was cut.
        patience: Seconds in which a call is answered, and in which what was said arrives at last.
        soon: See `SOON`.
        closed_within: See `CLOSED_WITHIN`.
    """

    def __init__(
        self,
        proxy: StreamProxy,
        notes: Path,
        dice: random.Random,
        *,
        has_events: bool,
        pause: float = 2.0,
        cut_every: float = 6.0,
        lingers: Sequence[float] = (0, LINGERS),
        patience: float = 40.0,
        soon: float = SOON,
        closed_within: float = CLOSED_WITHIN,
    ) -> None:
        super().__init__(proxy.mcp_url, notes, dice, patience=patience)
        self._soon = soon
        self._closed_within = closed_within
        self.proxy = proxy
        self.cuts = 0
        self._has_events = has_events
        self._pause = pause
        self._cut_every = cut_every
        self._lingers = lingers
        self._clients: dict[str, Respondent] = {}
        self._given_up: dict[str, float] = {}
        """Times at which clients were found without a stream, or had failed, by their names."""
        self._owner: dict[str, str] = {}
        """Names of clients by tokens."""
        self._waiting = 0
        """Number of clients that have nothing more to say."""
        self._is_over = False
        self._deaf = 0

    async def run(
        self, counts: Mapping[str, int], *, clients: int, client_kinds: Sequence[ClientKind] = ("official",)
    ) -> None:
        """Have so many messages of each kind said, in random order, to so many clients, half of which lose streams."""
        self._jobs = [kind for kind, count in counts.items() for _ in range(count)]
        self._dice.shuffle(self._jobs)
        async with anyio.create_task_group() as group:
            for number in range(clients):
                group.start_soon(self._work_as, client_kinds[number % len(client_kinds)], number % 4 < 2)
            while self._waiting < clients:
                await anyio.sleep(0.1)
            with anyio.move_on_after(self._patience):
                while any(tally.lost for tally in self._tallies().values()):
                    await anyio.sleep(0.2)
            # What comes twice may come late, and older streams have time to end.
            await anyio.sleep(self._closed_within)
            self._is_over = True

    async def _work_as(self, kind: ClientKind, is_restless: bool) -> None:
        while self._jobs:
            self._number += 1
            name = f"client {self._number}"
            try:
                async with respondent(self.url, name, self.wire, kind) as client:
                    self._clients[name] = client
                    await self._say_and_hear(client, is_restless=is_restless)
            except Exception as error:
                # Of its session nothing is known any more.
                self._given_up.setdefault(name, time.time())
                self.failures[shown(error)] += 1
        self._waiting += 1
        while not self._is_over:
            await anyio.sleep(0.1)

    async def _say_and_hear(self, client: Respondent, *, is_restless: bool) -> None:
        """Be a client, until the trial is over or it has given up its stream."""
        session_id = self.wire.sessions[client.name]
        next_cut = time.time() + 1
        while self._jobs:
            if is_restless and time.time() > next_cut:
                self.proxy.cut(session_id, lingers=self._dice.choice(self._lingers))
                self.cuts += 1
                next_cut = time.time() + self._dice.uniform(0.5, 1) * self._cut_every
            if self._is_deaf(session_id):
                self._given_up[client.name] = time.time()
                self._deaf += 1
                return
            await self._say(client)
            await anyio.sleep(self._dice.uniform(0, self._pause))
        self._waiting += 1
        while not self._is_over:
            await anyio.sleep(0.1)
        self._waiting -= 1

    async def _say(self, client: Respondent) -> None:
        token = self._next(client.name)
        self._owner[token] = client.name
        self._expected[token] = client.expected(token)
        with anyio.move_on_after(self._patience) as scope:
            try:
                await client.be_told(token)
            except MCPError as error:
                if error.code == CONNECTION_CLOSED:
                    raise  # the client has ended
                self.failures[shown(error)] += 1
        if scope.cancelled_caught:
            self.failures["no result in time"] += 1

    def _is_deaf(self, session_id: str) -> bool:
        openings = list(self.proxy.of(session_id))
        ended = max((opening.broke_at for opening in openings), default=math.inf)
        return ended < time.time() - DEAF_AFTER

    # Verdicts

    async def tallies(self, *, within: float = 0.0) -> dict[str, StreamTally]:  # type: ignore[override]
        """Return what became of all messages, by kind, when the trial has run."""
        return self._tallies()

    def _tallies(self) -> dict[str, StreamTally]:  # type: ignore[override]
        heard = {name: Counter(client.heard) for name, client in self._clients.items()}
        on_streams: dict[str, list[Opening]] = defaultdict(list)
        for opening in self.proxy.openings:
            for token in set(opening.tokens()):
                on_streams[token].append(opening)
        tallies: dict[str, StreamTally] = {}
        for token, name in self._owner.items():
            tally = tallies.setdefault(token.partition("-")[0], StreamTally())
            tally.asked += 1
            notes = self.notes.of(token)
            others = any(counts[token] for other, counts in heard.items() if other != name)
            verdict = self._stream_verdict(token, notes, heard[name][token], on_streams[token], others=others)
            setattr(tally, verdict, getattr(tally, verdict) + 1)
            if verdict == "arrived":
                tally.elsewhere += on_streams[token][-1].pid != notes[0].pid
        return tallies

    def verdicts(self, verdict: str) -> list[str]:
        """Return the story of each message with a verdict, for people."""
        stories = []
        for token, name in self._owner.items():
            heard = self._clients[name].heard.count(token)
            openings = list(self.proxy.of(self.wire.sessions[name]))
            carried = [opening for opening in openings if token in opening.tokens()]
            notes = self.notes.of(token)
            if self._stream_verdict(token, notes, heard, carried, others=False) == verdict:
                began = notes[0].at
                lines = [f"{token} of {name}, heard {heard} times, {self._given_up.get(name)}"]
                lines += [f"  {note.at - began:+.3f} {note.what} by {note.pid} {note.value}" for note in notes]
                lines += [
                    f"  stream by {one.pid} {one.opened - began:+.3f} cut {one.cut and one.cut - began:+.3f} ended "
                    f"{one.ended and one.ended - began:+.3f} status {one.status} {'CARRIED' if one in carried else ''}"
                    for one in openings
                    if (one.ended or math.inf) > began - 10 and one.opened < began + 45
                ]
                lines += [
                    f"  {at - began:+.3f} {pid} killed" for pid, at in self.killed.items() if abs(at - began) < 40
                ]
                stories.append("\n".join(lines))
        return stories

    def _stream_verdict(
        self, token: str, notes: Sequence[Note], heard: int, openings: Sequence[Opening], *, others: bool
    ) -> str:
        if not notes:
            return "not_begun"
        said, name = notes[0], self._owner[token]
        if others:
            return "wrong"
        if heard > 1 or (not self._has_events and len(openings) > 1):
            return "repeated"
        killed_at = self.killed.get(said.pid, math.inf)
        if token.startswith("asked") and heard:
            answers = [note.value for note in notes if note.what == "answered"]
            if len(answers) > 1:
                return "repeated"
            if answers:
                return "arrived" if answers == [self._expected[token]] else "wrong"
            answer = self.wire.answers.get(token, Posted())
            if killed_at < answer.at + self._soon:
                return "died"
            return "lost" if answer.accepted else "unheard"
        if heard:
            return "arrived"
        if said.at - 0.1 < killed_at < said.at + self._soon:
            return "died"
        streams = list(self.proxy.of(self.wire.sessions[name]))
        if not self._has_events and (
            openings or any(self._is_given_to_broken(said.at, one, self._broke_at(one)) for one in streams)
        ):
            return "broken"
        if self._given_up.get(name, math.inf) < said.at + DEAF_AFTER:
            return "unheard"
        return "lost"

    def _broke_at(self, opening: Opening) -> float:
        """Return when a stream broke, though not when its process closed it.

        What the process sends while the load balancer holds its connection open is known, and so that does not count.
        """
        killed_at = self.killed.get(opening.pid, math.inf)
        cut = 0.0 if opening.lingers else opening.cut
        if opening.closed_by_server and killed_at > opening.ended + self._soon:
            return cut or math.inf
        return min(cut or opening.ended or math.inf, killed_at)

    def _is_given_to_broken(self, said_at: float, opening: Opening, broke_at: float) -> bool:
        """Return whether a message may have been given to a stream when it broke."""
        return opening.opened > 0 and said_at < broke_at < max(said_at, opening.opened) + self._soon

    def disordered(self) -> int:
        """Return how many notifications of a process came after later ones of the same process."""
        count = 0
        for name in self._clients:
            owned = [token for token, owner in self._owner.items() if owner == name and not token.startswith("asked")]
            said = [(notes[0].at, notes[0].pid, token) for token in owned if (notes := self.notes.of(token))]
            rank = {token: (pid, number) for number, (_, pid, token) in enumerate(sorted(said))}
            latest: dict[int, int] = {}
            seen = set()
            for opening in self.proxy.of(self.wire.sessions[name]):
                for token in opening.passed_tokens() if self._has_events else opening.tokens():
                    if token in rank and token not in seen:
                        seen.add(token)
                        pid, number = rank[token]
                        count += number < latest.get(pid, -1)
                        latest[pid] = max(number, latest.get(pid, -1))
        return count

    def kept_open(self, *, by_killed: bool = True) -> list[str]:
        """Return a line on each older stream that was not closed in time though the client had opened a newer one.

        Args:
            by_killed: Whether those count whose newer stream ended in time with its process, which may not
                have told the older one.
        """
        kept = []
        for session_id in self.wire.sessions.values():
            opened = sorted((one for one in self.proxy.of(session_id) if one.opened), key=lambda one: one.opened)
            for older, newer in itertools.pairwise(opened):
                ended = (older.ended or time.time()) - newer.opened
                is_killed = self.killed.get(newer.pid, math.inf) < newer.opened + self._closed_within
                if ended > self._closed_within and (by_killed or not is_killed):
                    killed = {pid: round(at - newer.opened, 3) for pid, at in self.killed.items()}
                    near = {pid: at for pid, at in killed.items() if abs(at) < 2 * LINGERS}
                    began = older.opened - newer.opened
                    kept.append(
                        f"by {older.pid} from {began:+.3f} s to {ended:+.3f} s of one by {newer.pid}; killed: {near}"
                    )
        return kept

    @property
    def given_up(self) -> int:
        """Number of clients that have given up their stream, or failed."""
        return len(self._given_up)

    @property
    def deaf(self) -> int:
        """Number of them that went on without a stream."""
        return self._deaf
