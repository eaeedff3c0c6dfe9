"""Whether an instance can serve, and what its log says of a store that cannot be used."""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.errors import ConfigurationError, SchemaError, StoreBusy, StoreMisconfigured, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp_session_store.errors import SessionStoreError
    from mcp_session_store.store import Store

__all__ = ["FINAL", "VERDICT_WITHIN", "Readiness", "State", "not_answered"]

logger = logging.getLogger(__name__)

FINAL: Final = (StoreMisconfigured, SchemaError, ConfigurationError)
"""Errors that waiting does not mend: a start ends with them, and a process that runs is not ready."""
REPEATED: Final = 60.0
"""Seconds from the end of a final cause within which the same one is not logged again.

A role that has lost a privilege, or a password that was changed, fails some calls and not others.
"""


UNEXPLAINED: Final = 4
"""Number of failures in a row after which a task that fails while the store answers is no sign of a trouble of it."""
VERDICT_WITHIN: Final = 5.0
"""Seconds for which a start asks the store whether it can be used."""


class State(Enum):
    """How an instance is."""

    STARTING = "starting"
    """The schema was not found to fit yet."""
    READY = "ready"
    """The store answers."""
    DEGRADED = "degraded"
    """The store is away, and requests that need it wait."""
    NOT_READY = "not_ready"
    """The store cannot be used until a final cause is repaired."""
    STOPPING = "stopping"
    """The instance stops."""


class Readiness:
    """The readiness of one instance: it hears whether the store answers, and logs when that changes.

    Each trouble has one line when it begins and one when it is over, whichever requests and background tasks meet it.

    Args:
        namespace: Namespace of the sessions.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace: Final = namespace
        self.cause: SessionStoreError | None = None
        """Why the store did not serve when it was last tried; `None` when it did."""
        self.verdict: SessionStoreError | None = None
        """Passing cause that was found before the instance starts to run, which then does not ask again."""
        self.look: Callable[[], None] = _nothing
        """Has the store be asked soon whether it answers."""
        self._was_ready = False
        self._stopping = False
        self._since = 0.0
        self._logged: str | None = None
        """What the log says of this trouble."""
        self._repeated_until = ("", -math.inf)

    @property
    def state(self) -> State:
        """State of the instance now."""
        if self._stopping:
            return State.STOPPING
        if isinstance(self.cause, FINAL):
            return State.NOT_READY
        if not self._was_ready:
            return State.STARTING
        return State.READY if self.cause is None else State.DEGRADED

    def answered(self, waited: int = 0) -> None:
        """Note that the store answered.

        Args:
            waited: Number of requests that waited for it.
        """
        self._was_ready = True
        if (cause := self.cause) is None:
            return
        self.cause = None
        now = clock.now()
        is_final = isinstance(cause, FINAL)
        if is_final:
            self._repeated_until = (str(cause), now + REPEATED)
        if self._logged is not None:
            # As loud as the begin, so that no log ends with it.
            logger.warning(
                "the session store %s after %.1f s; %d requests waited for it",
                "can be used again" if is_final else "is back",
                now - self._since,
                waited,
            )
        self._logged = None

    def failed(self, error: SessionStoreError) -> None:
        """Note that the store did not serve: it is away, or cannot be used as it is."""
        if self._stopping:
            return
        before, self.cause = self.cause, error
        if before is None:
            self._since = clock.now()
            telemetry.outages.add(1, telemetry.of(self.namespace))
        if isinstance(error, FINAL):
            repeated, until = self._repeated_until
            if str(error) == self._logged or (str(error) == repeated and clock.now() < until):
                return
            self._logged = str(error)
            logger.error(
                "the session store cannot be used, and requests that need it wait until that is repaired, or are "
                "refused: %s",
                error,
            )
        elif before is None:
            self._logged = str(error)
            logger.warning("the session store is away, and requests that need it wait until it is back: %s", error)

    async def ask(self, store: Store, *steps: Callable[[], Awaitable[None]]) -> bool:
        """Ask the store once whether it can be used, and return whether it answered. What may pass is waited for.

        Args:
            store: The store, which is opened.
            *steps: Calls of it that must succeed before the instance serves.

        Raises:
            SessionStoreError: A final cause.
        """
        try:
            if (verdict := self.verdict) is not None:
                # The store was closed after the verdict. It is open as soon as it is asked to be.
                with anyio.move_on_after(0):
                    await store.open()
                raise verdict
            with anyio.move_on_after(VERDICT_WITHIN) as scope:
                await store.open()
                for step in steps:
                    await step()
            if scope.cancelled_caught:
                raise not_answered()
        except (StoreUnavailable, StoreBusy) as error:
            self.failed(error)
            return False
        self.answered()
        return True

    def covers(self, error: Exception, failures: int) -> bool:
        """Return whether the log says of a failure beside the requests what is to be said already, or is about to.

        Args:
            error: The failure.
            failures: Number of times in a row that the same work has failed.
        """
        if not isinstance(error, (StoreUnavailable, *FINAL)):
            return False
        if self.cause is None and failures < UNEXPLAINED:
            self.look()
            return True
        return self.cause is not None

    def stop(self) -> None:
        """Note that the instance stops."""
        self._stopping = True


def not_answered() -> StoreUnavailable:
    """Return the error of a store that was silent for as long as a start asks it."""
    return StoreUnavailable(f"the session store did not answer within {VERDICT_WITHIN:g} s")


def _nothing() -> None:
    return
