"""The command that sweeps: for cron, where the servers do not sweep themselves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

import click

from mcp_session_store.cli.options import (
    event_options,
    json_option,
    read_settings,
    run,
    sweep_retention_options,
)
from mcp_session_store.cli.output import number, plural, print_json, progress
from mcp_session_store.cli.target import target_options
from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.event_log import EVENT_SWEEP_LIMIT, LEAST_EVENT_SWEEP
from mcp_session_store.retention import EventPolicy, EventSweepReport, RetentionPolicy, SweepPace, SweepReport
from mcp_session_store.store import LEAST_SWEEP, SWEEP_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mcp_session_store.cli.target import Target

__all__ = ["sweep"]

_KILLED_BY: Final = 128
"""Number that a shell adds to that of the signal that ended a command."""


@click.command(short_help="End expired sessions, and remove what is too old.")
@target_options
@sweep_retention_options
@event_options
@click.option("--dry-run", is_flag=True, help="Print what a sweep would do, and do nothing.")
@click.option(
    "--limit-per-step",
    default=SWEEP_LIMIT,
    show_default=True,
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Most sessions of each kind that one short transaction handles; fewer on SQLite, while that takes too long.",
)
@click.option("--no-pause", is_flag=True, help="Do not pause after each step for as long as it took.")
@json_option
def sweep(
    target: Target,
    *,
    retention: Mapping[str, str],
    event_retention: Mapping[str, str],
    dry_run: bool,
    limit_per_step: int,
    no_pause: bool,
    as_json: bool,
) -> None:
    """End sessions that have expired, and remove those that ended long ago, events that are too old, messages that no
    instance reads, expired values of a SqlKeyValue, and state whose time is over.

    The sweep goes on until there are no more. A session expires when the servers said; with --idle or --absolute, a
    session without an expiry gets one by that policy, as if it were used now. Events are removed by the options, so
    give those that the servers have. Any number of sweeps may run at once, beside the servers' own. SIGINT and SIGTERM
    stop it after the step that runs; the exit code is then 130 or 143, and the next sweep does the rest.
    """
    policy = read_settings(RetentionPolicy, retention)
    if not {"idle", "absolute"} & policy.model_fields_set:
        # A session without an expiry stays so: the policy of the servers wants none.
        policy = policy.model_copy(update={"idle": None})
    for_events = read_settings(EventPolicy, event_retention)
    if dry_run:
        _report(*run(_preview(target, policy, for_events)), dry_run=True, as_json=as_json)
        return
    sweeping = _Sweep(target, policy, for_events, limit=limit_per_step, pause=not no_pause)
    try:
        run(sweeping.run())
    except BaseException:
        if (
            sweeping.done.expired
            or sweeping.done.purged
            or sweeping.done.values
            or sweeping.events.removed
            or sweeping.messages
            or sweeping.state
        ):
            sweeping.report(as_json=as_json)
        raise
    sweeping.report(as_json=as_json)
    if sweeping.stopped_by is not None:
        raise click.exceptions.Exit(_KILLED_BY + sweeping.stopped_by)


async def _preview(
    target: Target, policy: RetentionPolicy, for_events: EventPolicy
) -> tuple[SweepReport, EventSweepReport]:
    async with target.directory() as directory, target.event_directory() as event_directory:
        events = await event_directory.preview(for_events)
        return await directory.preview(policy), EventSweepReport(removed=events, more=events > 0)


def _report(
    report: SweepReport,
    events: EventSweepReport,
    *,
    dry_run: bool,
    as_json: bool,
    messages: int | None = None,
    state: int | None = None,
) -> None:
    more = report.more or events.more
    if as_json:
        counts = {
            "expired": report.expired,
            "purged": report.purged,
            "events": events.removed,
            "messages": messages,
            "values": None if dry_run else report.values,
            "state": state,
        }
        # How many messages wait says nothing of how many a sweep would find, and values are not counted before.
        known = {name: count for name, count in counts.items() if count is not None}
        print_json({"dry_run": dry_run, **known, "more": more})
        return
    ended, removed = ("would end", "would be removed") if dry_run else ("ended", "were removed")
    click.echo(
        f"{number(report.expired)} expired {plural('session', report.expired)} {ended}, "
        f"{number(report.purged)} that ended long ago {removed} for good"
    )
    if events.removed:
        click.echo(f"{number(events.removed)} old {plural('event', events.removed)} {removed}")
    if report.values:
        click.echo(f"{number(report.values)} expired {plural('value', report.values)} were removed")
    if messages:
        click.echo(f"{number(messages)} {plural('message', messages)} to instances that do not read were removed")
    if state:
        click.echo(f"{number(state)} {plural('value', state)} of sessions' state, whose time was over, were removed")
    if more and not dry_run:
        click.echo("there is more to sweep", err=True)


class _Sweep:
    """Sweep from its first step to its last, or until a signal."""

    def __init__(
        self, target: Target, policy: RetentionPolicy, for_events: EventPolicy, *, limit: int, pause: bool
    ) -> None:
        self._target = target
        self._policy = policy
        self._for_events = for_events
        self._limit = limit
        self._pause = pause
        self.done = SweepReport(more=True)
        self.events = EventSweepReport(more=True)
        self.messages = 0
        """Number of messages that were removed."""
        self.state = 0
        """Number of values of sessions' state that were removed."""
        self.stopped_by: signal.Signals | None = None

    async def run(self) -> None:
        stop = asyncio.Event()
        with self._stopping_at_signals(stop):
            total = None
            if sys.stderr.isatty():
                # For the bar, which goes without a total when the count takes too long.
                with contextlib.suppress(StoreUnavailable):
                    expected, events = await _preview(self._target, self._policy, self._for_events)
                    total = expected.expired + expected.purged + events.removed
            async with (
                self._target.store(self._policy) as store,
                self._target.event_log(store, self._for_events) as log,
                self._target.mailbox(store) as mailbox,
                self._target.state_store(store) as state,
            ):
                with progress("sweeping", total=total) as advance:
                    pace = SweepPace(self._limit, least=LEAST_SWEEP)
                    while self.done.more and not stop.is_set():
                        begun = time.monotonic()
                        step = await store.sweep(limit=pace.limit)
                        self.done += step
                        advance(step.expired + step.purged)
                        await self._rest(stop, pace.pause_after(step, time.monotonic() - begun), more=step.more)
                    pace = SweepPace(EVENT_SWEEP_LIMIT, least=LEAST_EVENT_SWEEP)
                    while self.events.more and not stop.is_set():
                        begun = time.monotonic()
                        of_events = await log.sweep(limit=pace.limit)
                        self.events += of_events
                        advance(of_events.removed)
                        pause = pace.pause_after(of_events, time.monotonic() - begun)
                        await self._rest(stop, pause, more=of_events.more)
                    more = True
                    while more and not stop.is_set():
                        of_messages = await mailbox.sweep()
                        removed = (of_messages.gone, of_messages.unread, of_messages.untaken)
                        self.messages += sum(sum(numbers.values()) for numbers in removed)
                        more = of_messages.more
                    more = True
                    while more and not stop.is_set():
                        of_state = await state.sweep()
                        self.state += of_state.removed
                        more = of_state.more

    def report(self, *, as_json: bool) -> None:
        """Print what was done."""
        _report(self.done, self.events, dry_run=False, as_json=as_json, messages=self.messages, state=self.state)

    async def _rest(self, stop: asyncio.Event, pause: float, *, more: bool) -> None:
        """Leave the database to the servers after a step."""
        if self._pause and more:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)

    @contextlib.contextmanager
    def _stopping_at_signals(self, stop: asyncio.Event) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def stop_for(number: signal.Signals) -> None:
            self.stopped_by = number
            stop.set()

        signals = (signal.SIGINT, signal.SIGTERM)
        for one in signals:
            loop.add_signal_handler(one, stop_for, one)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)
