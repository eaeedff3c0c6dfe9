"""This instance and the others: heartbeats, numbers, and which instances are dead.

A death shows by missing heartbeats, and at once by the release of what each instance holds while it lives.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol
from uuid import uuid4

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import Wake, report_failure, run_again, run_every
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.errors import SessionStoreError
from mcp_session_store.mailbox import SILENT_AFTER, Presence
from mcp_session_store.records import display_text, instance_name
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from datetime import timedelta

    from mcp_session_store.adapter.question_ids import QuestionIds
    from mcp_session_store.adapter.readiness import Readiness
    from mcp_session_store.mailbox import Mailbox

__all__ = ["INSTANCE_NAME", "MAX_PAUSE", "Instances", "Residents", "instance_id"]

logger = logging.getLogger(__name__)

INSTANCE_NAME: Final = re.compile(r"[0-9a-f]{8}")
"""Name of an instance, with which the names of its streams begin."""

MAX_PAUSE: Final = 1.0
"""Most seconds between two tries to hold something, and to store that it is held or no longer is."""
LOOK: Final = 1.0
"""Seconds between two looks at other instances, at most."""
LOOK_AGAIN: Final = 0.2
"""Seconds between two looks while something is released."""
RELEASED_FOR: Final = 2.5
"""Seconds for which something is released that only a death releases. A connection breaks in a living instance, too,
which then stores a heartbeat within that time."""
LONG_SILENCE: Final = SILENT_AFTER.total_seconds() / 2
"""Seconds without a heartbeat of this instance after which those of others are missing for the same reason, perhaps."""
BACK_WITHIN: Final = 10.0
"""Seconds after that in which the others have sent a heartbeat, too: they try once a second, and a try may time out."""
DRAWS: Final = 10
"""Numbers that a heartbeat tries in a row. One is taken once in many thousand times."""


class Residents(Protocol):
    """The sessions in memory, as a heartbeat counts them."""

    @property
    def resident(self) -> int:
        """Number of copies that requests find."""

    @property
    def streams(self) -> int:
        """Number of GET streams that are open."""


def _is_unnamed(server: str) -> bool:
    """Return whether a server has no name, or the one that FastMCP makes for one without, another each time."""
    return not server or re.fullmatch(r"\w+-[0-9a-f]{4}", server) is not None


def instance_id() -> str:
    """Return a name for this process: host, process id, and a random part, because the first two come again."""
    return f"{display_text(socket.gethostname(), length=80)}:{os.getpid()}:{uuid4().hex[:8]}"


class Instances:
    """This instance and the others that share its mailbox.

    Args:
        mailbox: Mailbox that holds the heartbeats.
        question_ids: Draws the number of this instance.
        residents: Sessions in memory.
        instance: Id of this instance.
        server: Name of the server that it runs.
        dead_after: Time without a heartbeat after which an instance is considered dead and its calls lost.
        relay: Whether its heartbeats have its number, so that other instances send it messages.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        question_ids: QuestionIds,
        residents: Residents,
        *,
        instance: str,
        server: str,
        dead_after: timedelta,
        relay: bool,
    ) -> None:
        self.mailbox: Final = mailbox
        self.question_ids: Final = question_ids
        self._residents = residents
        self._server = display_text(server, length=200)
        self._dead_after = dead_after
        self._relay = relay
        self._leaving = False
        self._listening: anyio.CancelScope | None = None
        self._looked_at = -math.inf
        self._released_for: dict[str, float] = {}
        """Seconds for which was seen that something is released, by the name of its instance."""
        self.entered: int | None = None
        """Number under which others can send messages to this instance. While another one was drawn and is not entered
        yet, still the former one."""
        self._entered_last: int | None = None
        self.beaten_at = -math.inf
        """Moment of `clock` of the last heartbeat that was stored."""
        self._others_are_back_at = -math.inf
        self.wake: Final = Wake(gathering=0)
        """Starts a heartbeat before its time, because something is held now, or no longer is."""
        self.reliable_since = math.inf
        """Since when our own heartbeats have succeeded, by anyio's clock: before, those of others may have failed.
        Infinite while the last one is not stored."""
        self.announced: Final = Latch()
        """A heartbeat of this instance is stored."""
        self.on_announced: Callable[[], None] | None = None
        """Called when the first heartbeat is stored."""
        self.on_renumbered: Callable[[], None] | None = None
        """Called when a number is entered that is not the one before."""
        self.on_back: Callable[[], None] | None = None
        """Called after a long outage, in which messages may have been missed, when others are heard of again."""
        self.on_hint: Callable[[], None] | None = None
        """Called when there may be messages for this instance."""
        self.before_beat: Callable[[], Awaitable[None]] | None = None
        """Reads the messages that wait, before each heartbeat but the first: a message is removed unread when its
        recipient has sent heartbeats for a while."""
        self.id = instance
        self.name = instance_name(instance)
        """Unique part of the id, with which the names of this instance's streams begin."""
        question_ids.on_drawn = self._renumber

    @property
    def is_entered(self) -> bool:
        """Whether other instances can send messages to the number of this one."""
        return self.entered == self.question_ids.number

    @property
    def is_reachable(self) -> bool:
        """Whether the last heartbeat of this instance was stored."""
        return self.reliable_since < math.inf

    @property
    def others_are_back(self) -> bool:
        """Whether this instance and others are heard of: not in an outage that silences all, and just after it."""
        return self._others_are_back_at <= clock.now() < self.beaten_at + LONG_SILENCE

    @property
    def can_send(self) -> bool:
        """Whether messages can be sent under the number of this instance.

        A message for one that has sent no heartbeat since a long outage would be dropped.
        """
        return self.is_entered and self.others_are_back

    @property
    def check_interval(self) -> float:
        """Seconds between two checks of other instances, at least."""
        return LOOK_AGAIN if self._released_for else min(self._dead_after.total_seconds() / 10, LOOK)

    async def find_other_servers(self) -> None:
        """Warn where another server shares the database and the namespace that neither of them has set.

        Raises:
            SessionStoreError: The mailbox cannot be reached.
        """
        namespace = self.mailbox.namespace
        if namespace != DEFAULT_NAMESPACE or _is_unnamed(self._server):
            return
        for other in await self.mailbox.instances():
            is_alive = other.heartbeat.ago <= self._dead_after and not other.heartbeat.released
            if is_alive and other.server != self._server and not _is_unnamed(other.server):
                logger.warning(
                    "the servers %r and %r share a database and the namespace %r: limits and lists of one count the "
                    "sessions of the other, and each serves the other's session ids; give each a namespace of its own",
                    other.server,
                    self._server,
                    namespace,
                )
                return

    def _renumber(self) -> None:
        """Enter the number that was drawn by a heartbeat, and listen for messages to it."""
        self.wake.set()
        if self._listening is not None:
            self._listening.cancel()

    async def run(self, readiness: Readiness) -> None:
        """Run the background tasks, until cancelled.

        Args:
            readiness: Readiness of this instance.
        """
        if not self.announced.is_set():
            self.wake.set()
        interval = self._dead_after.total_seconds() / 3
        beat = partial(run_every, "heartbeat", interval, self.beat, wake=self.wake)
        listen = partial(run_again, "message hints", self.listen)
        look = partial(run_again, "other servers", self._look)
        async with anyio.create_task_group() as tasks:
            for task in (beat, listen, look):
                tasks.start_soon(partial(task, max_backoff=MAX_PAUSE, readiness=readiness))

    async def _look(self) -> None:
        """Look for other servers, once, when a heartbeat of this instance is stored, which they see in turn."""
        await self.announced.wait()
        await self.find_other_servers()

    async def listen(self) -> None:
        """Pass on the mailbox's hints, and hold meanwhile what the death of this instance releases, until cancelled.

        Raises:
            SessionStoreError: Nothing is held any more.
        """
        try:
            while True:
                number = self.question_ids.number if self._relay else None
                with anyio.CancelScope() as scope:
                    self._listening = scope
                    await self.mailbox.listen(self._hint, instance=self.id, number=number, on_held=self.wake.set)
                if not scope.cancelled_caught:
                    return
        finally:
            # At once, because others take a release for a death unless a heartbeat follows.
            self.wake.set()

    def _hint(self) -> None:
        if self.on_hint is not None:
            self.on_hint()

    async def leave(self) -> None:
        """Store that nothing is held any more, before the end of this instance's tasks releases it. Raises nothing.

        Others would take the release for its death. It retires later, when the last answers of its calls are stored.
        """
        self._leaving = True
        try:
            await self.beat()
        except Exception as error:
            report_failure("heartbeat", error, namespace=self.mailbox.namespace)

    async def beat(self) -> None:
        """Store a heartbeat of this instance.

        Raises:
            SessionStoreError: The mailbox cannot be reached.
        """
        try:
            if self.announced.is_set() and self.before_beat is not None:
                await self.before_beat()
            await self._announce()
        except BaseException:
            self.reliable_since = math.inf
            raise
        self.reliable_since = min(self.reliable_since, anyio.current_time())
        now = clock.now()
        if self.announced.is_set() and now >= self.beaten_at + LONG_SILENCE:
            self._others_are_back_at = now + BACK_WITHIN
            if self.on_back is not None:
                self.on_back()
        self.beaten_at = now
        if not self.announced.is_set():
            self.announced.set()
            if self.on_announced is not None:
                self.on_announced()

    async def _announce(self) -> None:
        for _ in range(DRAWS):
            number = self.question_ids.number
            presence = Presence(
                instance=self.id,
                number=number if self._relay else None,
                held=not self._leaving,
                server=self._server,
                version=telemetry.VERSION,
                residents=self._residents.resident,
                streams=self._residents.streams,
            )
            if await self.mailbox.beat(presence):
                is_another = number not in (self.entered, self._entered_last)
                self.entered = number if self._relay else None
                if is_another and self._entered_last is not None and self.on_renumbered is not None:
                    self.on_renumbered()
                self._entered_last = number
                return
            self.entered = None
            # Another instance has it. What was asked under it can be answered here only.
            self.question_ids.draw()
        raise SessionStoreError(f"no number is free for this instance: {DRAWS} that it drew are taken")

    async def retire(self) -> None:
        """Store that this instance has stopped, so that its calls are lost at once."""
        await self.mailbox.retire(self.id)

    async def sweep(self) -> None:
        """Remove instances that are long silent, and messages that will not be read.

        Raises:
            SessionStoreError: The mailbox cannot be reached.
        """
        namespace = self.mailbox.namespace
        # In a long outage all are silent, and may have messages from before it.
        while self.others_are_back:
            report = await self.mailbox.sweep()
            dropped = {"recipient gone": report.gone, "unread": report.unread, "no stream": report.untaken}
            for reason, numbers in dropped.items():
                for kind, number in numbers.items():
                    telemetry.dropped_messages.add(number, telemetry.of(namespace, kind=kind, reason=reason))
            if not report.more:
                return

    async def find_dead(self, names: Collection[str]) -> list[str]:
        """Return which of these instances are dead.

        Args:
            names: Names of other instances.
        """
        # A mailbox refuses all of them for one name that no instance can have, such as one with a NUL.
        beats = await self.mailbox.last_beats([name for name in names if INSTANCE_NAME.fullmatch(name)])
        # After an outage of the database no heartbeat is young, and all instances run. A stopped one has none.
        is_certain = anyio.current_time() - self.reliable_since > self._dead_after.total_seconds()
        released_for = self._note_released({name for name, beat in beats.items() if beat.released})
        return [
            name
            for name in names
            if (beat := beats.get(name)) is None
            or (is_certain and beat.ago > self._dead_after)
            or min(released_for.get(name, 0.0), beat.ago.total_seconds()) > RELEASED_FOR
        ]

    def _note_released(self, released: Collection[str]) -> dict[str, float]:
        """Note a look at other instances; return for how many seconds each has been seen to hold nothing any more."""
        now = anyio.current_time()
        passed, self._looked_at = now - self._looked_at, now
        # What was seen before a longer gap, as no client waited, may have been over since.
        before = self._released_for if passed <= RELEASED_FOR else {}
        # No longer than that, because nothing is known of a pause of this process, or of an outage.
        passed = min(passed, LOOK)
        self._released_for = {name: before[name] + passed if name in before else 0.0 for name in released}
        return self._released_for
