"""What becomes of sessions: each opening, restore, eviction, end and refusal is counted, and logged in one line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.records import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from mcp_session_store.mailbox import MessageKind
    from mcp_session_store.records import SessionRecord
    from mcp_session_store.retention import SweepReport
    from mcp_session_store.stream_mail import StreamMessageKind

__all__ = [
    "CLOSED",
    "ENDED",
    "GONE",
    "FIELDS",
    "IDLE",
    "LOGGER",
    "MEMORY_FULL",
    "NOT_RESTORED",
    "STALE",
    "STOPPING",
    "UNKNOWN_QUESTION",
    "SessionLog",
]

LOGGER: Final = "mcp_session_store.sessions"
"""Name of the logger of these lines, in whichever module they come about."""

logger = logging.getLogger(LOGGER)

FIELDS: Final = {
    "mcp_event": "`opened`, `restored`, `evicted`, `ended`, `refused`, `swept` or `stopping`",
    "mcp_session_key": "key of the session",
    "mcp_namespace": "namespace",
    "mcp_instance": "this instance",
    "mcp_client_name": "what the client calls itself",
    "mcp_client_version": "the version that it names",
    "mcp_reason": "why: of evictions, ends and refusals",
    "mcp_duration": "seconds: of the handshake, of the restore, of the whole session at its end",
    "mcp_previous_instance": "instance that opened or restored the session before",
    "mcp_restores": "number of restores of the session, this one included",
}
"""Fields of the log records, by their names in `extra`. No attribute of a log record begins with `mcp_`, unless an
application gives its records some: then those stay."""

REFUSALS_LOGGED: Final = 10
"""Number of refusals for one reason that are logged within `WINDOW`; the others only count."""
WINDOW: Final = 60.0
"""Seconds."""

IDLE: Final = "idle"
"""Reason of an eviction: the client has not been in contact for a while."""
MEMORY_FULL: Final = "memory full"
"""Reason of an eviction: another session needs the place."""
STALE: Final = "changed elsewhere"
"""Reason of an eviction: another copy has changed what a restore replays."""
CLOSED: Final = "closed"
"""Reason of an eviction: the transport was terminated by others, or the server loop has ended by itself."""
STOPPING: Final = "stopping"
"""Reason of an eviction: the instance stops."""
ENDED: Final = "ended"
"""Reason of an eviction: the session has ended, which has a line of its own."""
NOT_RESTORED: Final = "not restored"
"""Reason of an eviction: the restore failed when all was replayed."""

GONE: Final = "instance gone"
"""Reason to drop a message: no running instance has the number that it is for."""
UNKNOWN_QUESTION: Final = "unknown question"
"""Reason to drop an answer or progress: the copy has no open question of this id."""


class _Budget:
    """What is logged of the refusals for one reason."""

    __slots__ = ("left", "omitted", "until")

    def __init__(self) -> None:
        self.left = REFUSALS_LOGGED
        self.omitted = 0
        """Number of refusals that were not logged."""
        self.until = clock.now() + WINDOW


class SessionLog:
    """Counts and logs what becomes of the sessions of one manager.

    Strangers can cause refusals, as many as they like. So the log takes a few of each reason in a minute, and says how
    many it left out.

    Args:
        namespace: Namespace of the sessions.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace: Final = namespace
        self.instance = ""
        """Id of this instance; made when the manager starts to run."""
        self._of: Final = telemetry.of(namespace)
        self._opened_of: Final = telemetry.of(namespace, outcome="opened")
        self._restored_of: Final = telemetry.of(namespace, outcome="restored")
        self._budgets: dict[str, _Budget] = {}

    def opened(self, record: SessionRecord, *, seconds: float) -> None:
        """Note that a session was opened.

        Args:
            record: Its record.
            seconds: Time since `initialize` was received.
        """
        telemetry.created.add(1, self._of)
        telemetry.handshakes.record(seconds, self._opened_of)
        if logger.isEnabledFor(logging.INFO):
            _say(
                logging.INFO,
                "the session %s was opened by %s",
                record.key,
                _client(record),
                extra=self._extra("opened", record.key, record, duration=seconds),
            )

    def restored(self, record: SessionRecord, *, previous_instance: str, restores: int, seconds: float) -> None:
        """Note that a session was restored.

        Args:
            record: Its record.
            previous_instance: Id of the instance that opened or restored it before.
            restores: Number of its restores, this one included.
            seconds: Time since its record was loaded.
        """
        telemetry.restored.add(1, self._of)
        telemetry.restores.record(seconds, self._restored_of)
        if logger.isEnabledFor(logging.INFO):
            extra = self._extra("restored", record.key, record, duration=seconds)
            extra |= {"mcp_previous_instance": previous_instance, "mcp_restores": restores}
            _say(
                logging.INFO,
                "the session %s of %s was restored in %.3f s, from instance %s (restore %d)",
                record.key,
                _client(record),
                seconds,
                previous_instance,
                restores,
                extra=extra,
            )

    def not_restored(self, reason: str, *, seconds: float) -> None:
        """Note that a restore failed; the requests that wait for it are refused."""
        telemetry.restores.record(seconds, self._with(outcome=reason))

    def not_opened(self, reason: str, *, seconds: float) -> None:
        """Note that a handshake was not stored; its request is refused."""
        telemetry.handshakes.record(seconds, self._with(outcome=reason))

    def opened_again(self, *, seconds: float) -> None:
        """Note that a second handshake within a session was stored."""
        telemetry.handshakes.record(seconds, self._with(outcome="repeated"))

    def evicted(self, record: SessionRecord, reason: str) -> None:
        """Note that a copy leaves memory."""
        telemetry.evicted.add(1, self._with(reason=reason))
        # What ended has a line of its own. When an instance stops, as many leave memory as there are.
        level = logging.DEBUG if reason in (ENDED, STOPPING) else logging.INFO
        if logger.isEnabledFor(level):
            extra = self._extra("evicted", record.key, record, reason=reason)
            _say(level, "the session %s was evicted: %s", record.key, reason, extra=extra)

    def stopping(self, residents: int) -> None:
        """Note that the instance stops, and how many sessions leave memory by it, in one line for all."""
        extra = {"mcp_event": "stopping", "mcp_namespace": self.namespace, "mcp_instance": self.instance}
        text = "this instance stops: %d of its sessions leave memory, and stay stored"
        _say(logging.INFO, text, residents, extra=extra)

    def ended(
        self, key: UUID, reason: EndReason, record: SessionRecord | None, *, lived: float | None, counts: bool
    ) -> None:
        """Note that a session ended.

        Args:
            key: Key of the session.
            reason: Why it ended.
            record: Its record.
            lived: Seconds since it was opened; `None`: not known.
            counts: Whether this call ended it, and no other instance counts it.
        """
        if counts:
            telemetry.ended.add(1, self._with(reason=reason.value))
        # What an instance ends it counts as well; what operators and limits end is recorded where it is in memory.
        if lived is not None and (counts or reason in (EndReason.OPERATOR, EndReason.LIMIT)):
            self.lived(lived, None if record is None else record.protocol_version)
        if logger.isEnabledFor(logging.INFO):
            extra = self._extra("ended", key, record, reason=reason.value, duration=lived)
            _say(logging.INFO, "the session %s ended: %s", key, reason.value, extra=extra)

    def lived(self, seconds: float, protocol_version: str | None = None) -> None:
        """Record the duration of a session that has ended, by the semantic conventions for MCP."""
        attributes = self._with(**{"network.protocol.name": "http", "network.transport": "tcp"})
        if protocol_version is not None:
            attributes["mcp.protocol.version"] = protocol_version
        telemetry.session_duration.record(seconds, attributes)

    def swept(self, step: SweepReport) -> None:
        """Note what a step of a sweep did."""
        if step.expired:
            telemetry.ended.add(step.expired, self._with(reason=EndReason.EXPIRED.value))
        if step.purged:
            telemetry.purged.add(step.purged, self._of)
        for seconds in step.lives:
            self.lived(seconds)

    def sweep_over(self, sweep: SweepReport) -> None:
        """Note what a whole sweep did, in one line for all its sessions."""
        if sweep.expired or sweep.purged:
            extra = {"mcp_event": "swept", "mcp_namespace": self.namespace, "mcp_instance": self.instance}
            _say(
                logging.INFO,
                "a sweep ended expired sessions (%d), and removed those that had ended long ago (%d)",
                sweep.expired,
                sweep.purged,
                extra=extra,
            )

    def refused(
        self,
        key: UUID,
        reason: str,
        *,
        text: str = "a request for the session %s is refused: %s",
        cause: object = None,
        level: int = logging.INFO,
        error: BaseException | None = None,
    ) -> None:
        """Log that a request was refused, unless there were many for that reason within a minute.

        Args:
            key: Key of the session that the request is for.
            reason: The reason, as it is counted.
            text: The line, with places for the key and the cause.
            cause: The cause; the reason unless given.
            level: Level of the line; lines that are left out are logged at DEBUG.
            error: Error to log with its traceback.
        """
        budget = self._budgets.get(reason)
        if budget is None or clock.now() >= budget.until:
            if budget is not None and budget.omitted:
                text += f" (and {budget.omitted} more since the last such line)"
            budget = self._budgets[reason] = _Budget()
        if budget.left:
            budget.left -= 1
        else:
            budget.omitted += 1
            level = logging.DEBUG
        if logger.isEnabledFor(level):
            extra = self._extra("refused", key, reason=reason)
            _say(level, text, key, reason if cause is None else cause, extra=extra, error=error)

    def dropped(self, kind: MessageKind | StreamMessageKind, reason: str = UNKNOWN_QUESTION) -> None:
        """Count a message of a client that reaches no copy of its session, or one that reaches no stream."""
        telemetry.dropped_messages.add(1, self._with(kind=kind.value, reason=reason))

    def gone(self, key: UUID, number: int) -> None:
        """Log that messages of clients are dropped, because the instance that they are for has stopped or died.

        Args:
            key: Key of the first one's session.
            number: Number of the instance.
        """
        text = "messages of the session %s are dropped: %s"
        cause = f"the instance {number}, which asked the client, has stopped or died"
        self.refused(key, GONE, text=text, cause=cause)

    def _with(self, **attributes: str) -> dict[str, str]:
        return telemetry.of(self.namespace, **attributes)

    def _extra(
        self,
        event: str,
        key: UUID,
        record: SessionRecord | None = None,
        *,
        reason: str | None = None,
        duration: float | None = None,
    ) -> dict[str, object]:
        extra: dict[str, object] = {
            "mcp_event": event,
            "mcp_session_key": str(key),
            "mcp_namespace": self.namespace,
            "mcp_instance": self.instance,
        }
        if record is not None:
            extra |= {"mcp_client_name": record.client_name, "mcp_client_version": record.client_version}
        if reason is not None:
            extra["mcp_reason"] = reason
        if duration is not None:
            extra["mcp_duration"] = round(duration, 6)
        return extra


def _say(
    level: int, text: str, *arguments: object, extra: Mapping[str, object], error: BaseException | None = None
) -> None:
    """Log a line with fields, whatever fields the application gives all records itself."""
    try:
        logger.log(level, text, *arguments, extra=extra, exc_info=error, stacklevel=2)
    except KeyError:
        # `logging` refuses a field that the application's factory of records has set already, which then stays.
        made = vars(logging.makeLogRecord({}))
        free = {name: value for name, value in extra.items() if name not in made}
        logger.log(level, text, *arguments, extra=free, exc_info=error, stacklevel=2)


def _client(record: SessionRecord) -> str:
    return f"{record.client_name} {record.client_version}".strip() or "a client without a name"
