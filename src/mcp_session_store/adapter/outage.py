"""An outage of the store is latency: requests wait until it is back, in order, and failed calls are made again."""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import anyio

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.requests import READ_AT_ONCE, ClientGone
from mcp_session_store.adapter.responses import ShuttingDown, TooManyWait
from mcp_session_store.errors import StoreBusy, StoreClosed, StoreMisconfigured, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp_session_store.adapter.readiness import Readiness
    from mcp_session_store.adapter.requests import Incoming
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.errors import SessionStoreError

__all__ = ["WAITED_FOR", "Gate", "RequestWait", "SharedWait", "Waits"]

_T = TypeVar("_T")

WAITED_FOR: Final = (StoreUnavailable, StoreMisconfigured)
"""Errors of the store after which requests wait and their calls are made again."""

FIRST_PROBE: Final = 0.1
"""Seconds from a failure until one call is made again."""
PROBE_INTERVAL: Final = 1.0
"""Least seconds between the beginnings of two such calls while the store stays away."""
AT_ONCE: Final = 250
"""Number of calls that go on at the same time when the store is back: half of what shares a statement."""
MAX_WAITING: Final = 10_000
"""Number of requests that may wait at the same time, those for streams apart."""
MAX_WAITING_STREAMS: Final = 10_000
"""Number of GET requests that may wait at the same time."""
MAX_BYTES: Final = 64 * 1024 * 1024
"""Bytes of bodies that all requests that wait may hold."""
STREAM_PATIENCE: Final = 300.0
"""Seconds that a GET waits at most; a client waits for a stream without a timeout, as a rule."""
DELETE_PATIENCE: Final = 5.0
"""Seconds that a DELETE waits at most: clients send it while they close, and wait for the answer."""


class Waits(Protocol):
    """What a call of the store is made for, and waits with it."""

    arrived: float
    """Moment of `clock` by which calls that wait are ordered."""

    async def during(self, gate: Gate, wait: Callable[[], Awaitable[_T]]) -> _T:
        """Await `wait`, which may take as long as the store is away, unless there is a reason to end before."""


class RequestWait:
    """One request, from its arrival on, and how it may wait.

    Args:
        method: HTTP method, which decides for how long.
        incoming: Body of the request, which is read on while it waits, so that its client's going is noticed. `None`:
            it is read elsewhere.
        held: Bytes that the request holds apart from that.
    """

    __slots__ = ("arrived", "held", "incoming", "method")

    def __init__(self, method: str, incoming: Incoming | None = None, *, held: int = 0) -> None:
        self.arrived = clock.now()
        self.method = method
        self.incoming = incoming
        self.held = held

    async def during(self, gate: Gate, wait: Callable[[], Awaitable[_T]]) -> _T:
        """See `Gate.hold`."""
        return await gate.hold(self, wait)


class SharedWait:
    """Work that several requests wait for, such as a restore, and that waits for the store itself.

    It has no patience of its own, because each of its requests has: it waits while one of them does.

    Args:
        arrived: Arrival of the request that caused the work.
    """

    __slots__ = ("_over", "_scope", "arrived", "is_over", "over_or_waiting", "waiters")

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.is_over = False
        self.over_or_waiting = Latch()
        """The work is over, or has begun to wait for the store."""
        self._over: Latch | None = None
        self.waiters = 0
        """Number of requests that wait for the work."""
        self._scope: anyio.CancelScope | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the work waits for the store now."""
        return self._scope is not None

    def end(self) -> None:
        """Note that the work is over."""
        self.is_over = True
        self.over_or_waiting.set()
        if self._over is not None:
            self._over.set()

    async def wait(self) -> None:
        """Wait until the work is over, which has begun to wait for the store."""
        if self._over is not None:
            await self._over.wait()

    async def during(self, gate: Gate, wait: Callable[[], Awaitable[_T]]) -> _T:  # noqa: ARG002
        """Await `wait`, until the work is given up."""
        if self.waiters:
            with anyio.CancelScope() as scope:
                self._scope = scope
                if self._over is None:
                    self._over = Latch()
                    self.over_or_waiting.set()
                try:
                    return await wait()
                finally:
                    self._scope = None
        raise StoreUnavailable("the session store is away, and no request waits for it any more")

    def give_up(self) -> None:
        """End the wait, because no request waits for the work any more."""
        if self._scope is not None:
            self._scope.cancel()


class _Place:
    """Place of one call in the order of those that wait."""

    __slots__ = ("failures", "order", "turn")

    def __init__(self, order: tuple[float, int], failures: int) -> None:
        self.order = order
        self.turn = anyio.Event()
        """The call is being made."""
        self.failures = failures


_order = attrgetter("order")


class Gate:
    """Where calls of requests wait while the store is away.

    It closes when a call fails because the store is away. Then one call at a time is made again: of those that
    have failed least the first, because a call may fail for a reason of its own, such as a locked row. When one
    succeeds, the others go on in the order in which their requests arrived, some at a time. When none is left the gate
    opens. While it is open it costs a request nothing.

    Args:
        tasks: Task group of the task that lets calls through.
        readiness: Learns when the gate closes and opens.
        patience: Seconds that a request waits at most, from its arrival on; 0: none ever waits.
    """

    def __init__(self, tasks: ManagerTasks, readiness: Readiness, *, patience: float) -> None:
        self._tasks = tasks
        self._readiness = readiness
        self._patience = patience
        self.is_open = True
        """Whether calls are made at once."""
        self.outages = 0
        """Number of times that the gate closed."""
        self._failure: SessionStoreError = StoreUnavailable("the session store is away")
        self._stopping = False
        self._places: list[_Place] = []
        """Calls that wait, in order."""
        self._under_way = 0
        """Number of calls that are being made again."""
        self._arrivals = 0
        self._answers = True
        """Whether the store answered when it was last tried."""
        self._prober: _Place | None = None
        self._probe_at = 0.0
        self._driving = False
        self._changed = anyio.Event()
        self.waiting = {False: 0, True: 0}
        """Number of requests that wait: those for streams, by `True`, and all others."""
        self._waited = 0
        self._bytes = 0
        self._scopes: set[anyio.CancelScope] = set()

    # What requests do

    def failed(self, error: SessionStoreError, outage: int) -> None:
        """Close after a failure of a call that was made while the gate was open.

        Args:
            error: The failure.
            outage: `outages` when the call was made. A failure from before an outage that is over closes nothing.

        Raises:
            SessionStoreError: The failure, where requests do not wait.
        """
        if outage == self.outages:
            self._readiness.failed(error)
        if not self._patience or self._stopping:
            raise error
        if outage == self.outages:
            self._close(error)

    async def answer_to(self, call: Callable[[], Awaitable[_T]], waits: Waits, *, failures: int) -> _T:
        """Make a call when its turn comes, and again until the store has answered it.

        Args:
            call: The call.
            waits: The request for which it is made, or the work that several requests wait for.
            failures: Number of times that the call has failed already.

        Raises:
            StoreUnavailable, StoreMisconfigured: The patience of the request is over, or too many wait.
            ClientGone: The client gave up.
            ShuttingDown: The instance stops.
        """
        if self._stopping:
            raise ShuttingDown
        return await waits.during(self, partial(self._in_turn, call, waits.arrived, failures))

    async def hold(self, request: RequestWait, wait: Callable[[], Awaitable[_T]]) -> _T:
        """Let a request wait, as in an outage: counted, within its patience, and no longer than its client does.

        Args:
            request: The request.
            wait: What it waits for.

        Raises:
            StoreUnavailable, StoreMisconfigured: The patience of the request is over, or too many wait.
            ClientGone: The client gave up.
            ShuttingDown: The instance stops.
        """
        is_stream = request.method == "GET"
        left = request.arrived + self._patience_of(request.method) - clock.now()
        if left <= 0:
            raise self._away("no time was left for the request to wait")
        if self._stopping:
            raise ShuttingDown
        limit = MAX_WAITING_STREAMS if is_stream else MAX_WAITING
        if self.waiting[is_stream] >= limit or self._bytes + request.held > MAX_BYTES:
            raise self._away("too many requests wait for it already", TooManyWait)
        incoming, held = request.incoming, request.held
        refusal: Exception | None = None
        self.waiting[is_stream] += 1
        self._waited += 1
        self._bytes += held

        async def watch(incoming: Incoming) -> None:
            nonlocal held, refusal
            await incoming.read(READ_AT_ONCE)
            held += len(incoming.body)
            self._bytes += len(incoming.body)
            if self._bytes > MAX_BYTES:
                refusal = self._away("the requests that wait for it hold too much already", TooManyWait)
            else:
                await incoming.disconnected()
                refusal = ClientGone()
            scope.cancel()

        try:
            with anyio.move_on_after(left) as scope:
                self._scopes.add(scope)
                async with anyio.create_task_group() as tasks:
                    if incoming is not None:
                        tasks.start_soon(watch, incoming)
                    try:
                        return await wait()
                    except Exception as error:
                        # Not from within the group, which would wrap it.
                        refusal = error
                    finally:
                        tasks.cancel_scope.cancel()
        finally:
            self._scopes.discard(scope)
            self.waiting[is_stream] -= 1
            self._bytes -= held
        if refusal is None:
            refusal = ShuttingDown() if self._stopping else self._away("the request waited for as long as it may")
        raise refusal

    # What else the gate hears of

    def store_answered(self) -> None:
        """Note that the store answered a call that no request made: an outage in which none waits is over."""
        if self.is_open:
            self._readiness.answered()
        elif not (self._places or self._under_way):
            self._open()

    def shut_down(self) -> None:
        """Answer the requests that wait, and let none wait from now on."""
        self._stopping = True
        for scope in self._scopes:
            scope.cancel()

    # How it works

    def _patience_of(self, method: str) -> float:
        if method == "GET":
            return STREAM_PATIENCE if self._patience else 0.0
        return min(self._patience, DELETE_PATIENCE) if method == "DELETE" else self._patience

    def _away(self, reason: str, kind: type[SessionStoreError] = StoreUnavailable) -> SessionStoreError:
        if isinstance(self._failure, StoreMisconfigured):
            kind = StoreMisconfigured
        away = kind(f"{self._failure}; {reason}")
        away.__cause__ = self._failure.__cause__
        return away

    async def _in_turn(self, call: Callable[[], Awaitable[_T]], arrived: float, failures: int) -> _T:
        self._arrivals += 1
        place = _Place((arrived, self._arrivals), failures)
        insort(self._places, place, key=_order)
        if not self._driving:
            self._driving = True
            self._tasks.start_soon(self._let_through)
        self._changed.set()
        try:
            while True:
                await place.turn.wait()
                try:
                    result = await call()
                except WAITED_FOR as error:
                    self._failed_again(place, error)
                except (StoreBusy, StoreClosed):
                    raise
                except Exception:
                    self._answers = True
                    raise
                else:
                    self._answers = True
                    return result
        finally:
            if place.turn.is_set():
                self._under_way -= 1
            else:
                del self._places[self._index_of(place)]
            if self._prober is place:
                self._prober = None
            self._changed.set()

    def _failed_again(self, place: _Place, error: SessionStoreError) -> None:
        place.turn = anyio.Event()
        place.failures += 1
        self._under_way -= 1
        insort(self._places, place, key=_order)
        self._failure = error
        self._readiness.failed(error)
        if self.is_open:
            self._close(error)
        elif self._answers:
            self._answers = False
            self._probe_at = clock.now() + FIRST_PROBE
        if self._prober is place:
            self._prober = None
        self._changed.set()

    async def _let_through(self) -> None:
        """Let calls through while any wait."""
        try:
            while self._places or self._under_way:
                self._changed = anyio.Event()
                if self._answers:
                    self._let_some_through()
                elif self._prober is None:
                    with anyio.move_on_after(self._probe_at - clock.now()):
                        await self._changed.wait()
                        continue
                    self._probe()
                await self._changed.wait()
            if self._answers and not self.is_open:
                self._open()
        finally:
            self._driving = False

    def _let_some_through(self) -> None:
        let_through = self._places[: max(AT_ONCE - self._under_way, 0)]
        del self._places[: len(let_through)]
        self._under_way += len(let_through)
        for place in let_through:
            place.turn.set()

    def _probe(self) -> None:
        if self._places:
            self._prober = min(self._places, key=lambda place: place.failures)
            del self._places[self._index_of(self._prober)]
            self._under_way += 1
            self._prober.turn.set()
            self._probe_at = clock.now() + PROBE_INTERVAL

    def _index_of(self, place: _Place) -> int:
        return bisect_left(self._places, place.order, key=_order)

    def _close(self, error: SessionStoreError) -> None:
        self._failure = error
        if not self.is_open:
            return
        self.is_open = False
        self.outages += 1
        self._answers = False
        self._waited = 0
        self._probe_at = clock.now() + FIRST_PROBE

    def _open(self) -> None:
        self.is_open = self._answers = True
        self._readiness.answered(self._waited)
