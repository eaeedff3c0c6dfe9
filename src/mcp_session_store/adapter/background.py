"""Work beside the requests, which goes on whatever fails: retried with back-off, logged, counted."""

from __future__ import annotations

import logging
import math
import random
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.errors import SessionStoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from mcp_session_store.adapter.readiness import Readiness

__all__ = ["Pace", "Wake", "is_cancelled", "report_failure", "run_again", "run_every"]

logger = logging.getLogger(__name__)

MIN_BACKOFF: Final = 0.25
MAX_BACKOFF: Final = 30.0
"""Seconds between two tries of a task that keeps failing."""


def is_cancelled() -> bool:
    """Return whether this task is being cancelled, and not only something that it waited for.

    A task that ends by a cancellation which is not its group's own cancels the whole group.
    """
    return anyio.get_current_task().has_pending_cancellation()


class Pace:
    """Least time between the beginnings of calls, so that what comes soon after one another shares the next.

    A lone call waits for nothing.

    Args:
        interval: Seconds between two beginnings.
    """

    __slots__ = ("_began", "_interval")

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._began = -math.inf

    async def wait(self) -> None:
        """Wait until the next call may begin, and note that it does."""
        pause = self._began + self._interval - clock.now()
        if pause > 0:
            await anyio.sleep(pause)
        self._began = clock.now()


class Wake:
    """Wakes a task before its time.

    Args:
        gathering: Seconds between the wake and the run, in which more work may gather.
        interval: Seconds between the beginnings of two runs, in which more work may gather; a lone run waits for none.
    """

    def __init__(self, *, gathering: float, interval: float = 0) -> None:
        self._gathering = gathering
        self._pace = Pace(interval)
        self._event = anyio.Event()

    def set(self) -> None:
        """Let the task run soon."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Wait until woken, but no longer than this many seconds; return whether it was woken."""
        with anyio.move_on_after(seconds):
            await self._event.wait()
            await anyio.sleep(self._gathering)
            await self._pace.wait()
        is_woken = self._event.is_set()
        self._event = anyio.Event()
        return is_woken


async def run_every(
    task: str,
    seconds: float,
    work: Callable[[], Awaitable[None]],
    *,
    wake: Wake | None = None,
    max_backoff: float = MAX_BACKOFF,
    readiness: Readiness | None = None,
) -> None:
    """Run a task at intervals, until cancelled.

    The intervals are up to a fifth shorter, at random, so that many instances that start at once do not stay in step.

    Args:
        task: Name of the task in the log.
        seconds: Seconds from the end of one run to the next run.
        work: The task.
        wake: Wakes the task before its time.
        max_backoff: Most seconds between two tries after failures.
        readiness: Says which failures the log has a line about already.
    """
    wake = wake or Wake(gathering=0)
    failures = _Failures(task, work, readiness)
    while True:
        pause = seconds * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
        if failures.number:
            # A task that has just failed is not woken: it backs off instead.
            await anyio.sleep(min(_backoff(failures.number, max_backoff), pause))
        else:
            await wake.wait(pause)
        await failures.run()


async def run_again(
    task: str,
    work: Callable[[], Awaitable[None]],
    *,
    max_backoff: float = MAX_BACKOFF,
    readiness: Readiness | None = None,
) -> None:
    """Run a task that is not meant to end, and again when it fails, until cancelled.

    Args:
        task: Name of the task in the log.
        work: The task.
        max_backoff: Most seconds between two tries.
        readiness: Says which failures the log has a line about already.
    """
    failures = _Failures(task, work, readiness)
    while True:
        began = anyio.current_time()
        await failures.run()
        if not failures.number:
            return
        if anyio.current_time() - began > MAX_BACKOFF:
            failures.number = 1
        await anyio.sleep(_backoff(failures.number, max_backoff))


def report_failure(
    task: str, error: Exception, *, key: UUID | None = None, log: bool = True, namespace: str | None = None
) -> None:
    """Count, and log, that something beside the requests failed.

    Args:
        task: Name of the task, in the log and in the metric.
        error: Reason of the failure.
        key: Key of the session that the failure is about, if it is about one.
        log: Whether to log it.
        namespace: Namespace of the sessions.
    """
    attributes = {"task": task} if namespace is None else telemetry.of(namespace, task=task)
    telemetry.background_failures.add(1, attributes)
    if not log:
        return
    name = task if key is None else f"{task} of session {key}"
    if isinstance(error, SessionStoreError):
        logger.warning("the background task %s failed, and tries again: %s", name, error)
    else:
        logger.error("the background task %s failed, and tries again", name, exc_info=error)


class _Failures:
    """Failures of a task in a row, and whether the log says of them."""

    __slots__ = ("_is_logged", "_readiness", "_task", "_work", "number")

    def __init__(self, task: str, work: Callable[[], Awaitable[None]], readiness: Readiness | None) -> None:
        self._task = task
        self._work = work
        self._readiness = readiness
        self._is_logged = False
        self.number = 0

    async def run(self) -> None:
        """Run the task once more."""
        try:
            await self._work()
        except Exception as error:
            self.number += 1
            # The log gets shorter with time: the 1st, 2nd, 4th, 8th failure is logged, and so on. All are counted.
            log = self.number & (self.number - 1) == 0
            if self._readiness is not None and self._readiness.covers(error, self.number):
                if log and self._readiness.cause is None:
                    # It may be a connection that was cut, of which nothing else says anything.
                    logger.info("the background task %s failed, and tries again: %s", self._task, error)
                log = False
            self._is_logged = self._is_logged or log
            namespace = None if self._readiness is None else self._readiness.namespace
            report_failure(self._task, error, log=log, namespace=namespace)
            return
        if self._is_logged:
            logger.info("the background task %s works again, after it failed %d times", self._task, self.number)
        self.number = 0
        self._is_logged = False


def _backoff(failures: int, at_most: float) -> float:
    longest: float = min(MIN_BACKOFF * 2 ** min(failures - 1, 10), at_most)
    return longest * random.uniform(0.75, 1.0)  # noqa: S311 - jitter
