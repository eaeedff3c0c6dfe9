"""The commands that partition the table of events, maintain its partitions, and undo it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mcp_session_store.cli.options import DURATION, events_max_age_option, json_option, read_settings, run
from mcp_session_store.cli.output import print_json
from mcp_session_store.cli.target import tables_options
from mcp_session_store.retention import EventPolicy

if TYPE_CHECKING:
    from datetime import timedelta

    from mcp_session_store.cli.target import Target
    from mcp_session_store.sql.admin.partitions import Maintenance

__all__ = ["maintain", "partition", "unpartition"]

_ahead_option = click.option(
    "--ahead", type=click.IntRange(1, 20), default=3, show_default=True, help="Partitions to make before their time."
)


@click.command()
@tables_options
@click.option(
    "--every",
    type=DURATION,
    required=True,
    metavar="DURATION",
    help="Time that a partition is for, as in 10m, 1h, 1d; it begins at a multiple of that, in UTC.",
)
@events_max_age_option
@_ahead_option
def partition(target: Target, *, every: timedelta, events_max_age: str | None, ahead: int) -> None:
    """Partition the events of all namespaces by time, on Postgres: old events are dropped, and no longer deleted.

    One transaction; the events stay. Servers neither store nor read an event while an index on the present ones is
    built. From then on run `events maintain` regularly, more often than a partition is long.
    """

    async def change() -> bool:
        async with target.event_partitions() as partitions:
            return await partitions.partition(every, max_age=_max_age(events_max_age), ahead=ahead)

    done = run(change())
    click.echo("the events are partitioned" if done else "the events were partitioned like that before")


@click.command()
@tables_options
@events_max_age_option
@_ahead_option
@json_option
def maintain(target: Target, *, events_max_age: str | None, ahead: int, as_json: bool) -> None:
    """Drop the partitions whose events are all older than --events-max-age, and make those of times to come.

    For cron. It may run at any time, also twice at once. Give it the --events-max-age of the servers; with several
    namespaces, the longest of them.
    """

    async def change() -> Maintenance:
        async with target.event_partitions() as partitions:
            return await partitions.maintain(max_age=_max_age(events_max_age), ahead=ahead)

    done = run(change())
    if as_json:
        print_json({"created": done.created, "dropped": done.dropped, "astray": done.default_in_use})
        return
    for what, names in (("dropped", done.dropped), ("made", done.created)):
        for name in names:
            click.echo(f"{what} {name}")
    if not done.dropped and not done.created:
        click.echo("there was nothing to do")
    if done.default_in_use:
        click.echo(
            "the default partition holds events, because there was no partition of their time: sweeps delete them one "
            "by one. Run this command more often, or with a larger --ahead",
            err=True,
        )


@click.command()
@tables_options
def unpartition(target: Target) -> None:
    """Make the events one table again.

    One transaction; the events stay. Servers neither store nor read an event while they are copied: give many events a
    longer --timeout.
    """

    async def change() -> bool:
        async with target.event_partitions() as partitions:
            return await partitions.unpartition()

    click.echo("the events are one table again" if run(change()) else "the events were not partitioned")


def _max_age(text: str | None) -> timedelta | None:
    return read_settings(EventPolicy, {} if text is None else {"max_age": text}).max_age
