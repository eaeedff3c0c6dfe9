"""The commands for the events that are stored: whose they are, what they are, and how their table is laid out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from mcp_session_store.cli.options import (
    DURATION,
    Failure,
    Group,
    events_max_age_option,
    json_option,
    place_options,
    read_settings,
    run,
    tables_options,
)
from mcp_session_store.cli.output import (
    Column,
    ago,
    cell,
    number,
    plural,
    print_json,
    print_table,
    size,
    stdout,
)
from mcp_session_store.cli.session_names import key_of
from mcp_session_store.retention import EventPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from rich.console import Console, RenderableType

    from mcp_session_store.cli.options import Place
    from mcp_session_store.sql.admin.events import (
        EventDirectory,
        EventStatistics,
        LogDetails,
        LoggedEvent,
        LogPage,
        StoredLog,
    )
    from mcp_session_store.sql.admin.partitions import Maintenance, Partition

__all__ = ["events"]

_PAGE: Final = 50
_LARGE_PAGE: Final = 500


@click.group(cls=Group)
def events() -> None:
    """List, show and count the events that are stored for streams that resume, and partition their table.

    A session is named as by the commands under `sessions`.
    """


_limit_option = click.option(
    "--limit", type=click.IntRange(1, 10_000), metavar="N", help=f"Lines on a page. Default: {_PAGE}."
)
_all_option = click.option("--all", "all_pages", is_flag=True, help="All pages, one after the other.")


@events.command("list")
@place_options
@_limit_option
@click.option("--after", metavar="CURSOR", help="Go on where a page ended, with what it printed.")
@_all_option
@json_option
def list_(place: Place, *, limit: int | None, after: str | None, all_pages: bool, as_json: bool) -> None:
    """List the sessions that have events, those with the oldest first, a page at a time.

    Bytes are those of the messages. Ages are by the database's clock. --json prints one document: as_of, logs, and
    next, which is the cursor for --after or null. With --all it prints one line of JSON for each session.
    """
    page_size = limit or (_LARGE_PAGE if all_pages else _PAGE)

    async def print_pages() -> None:
        count = 0
        async with place.event_directory() as directory:
            async for page in _pages(directory, limit=page_size, after=after):
                _print_page(page, first=count == 0, all_pages=all_pages, as_json=as_json)
                count += len(page.logs)
                if not all_pages:
                    if page.next is not None and not as_json:
                        click.echo(f"there are more: --after {page.next}", err=True)
                    break
        if count == 0 and not as_json:
            click.echo(f"no session in namespace {place.namespace} has events", err=True)

    run(print_pages())


async def _pages(directory: EventDirectory, *, limit: int, after: str | None) -> AsyncIterator[LogPage]:
    """The pages of the list, at least one."""
    while True:
        page = await directory.page(limit=limit, after=after)
        yield page
        if page.next is None:
            return
        after = page.next


_LOG_COLUMNS: Final = (
    Column(title="KEY", width=36),
    Column(title="EVENTS", width=9, right=True),
    Column(title="BYTES", width=9, right=True, rank=1),
    Column(title="FIRST", width=9, right=True, rank=4),
    Column(title="LAST", width=9, right=True, rank=3),
    Column(title="OLDEST", width=10, rank=2),
)


def _print_page(page: LogPage, *, first: bool, all_pages: bool, as_json: bool) -> None:
    if as_json and all_pages:
        for log in page.logs:
            print_json(asdict(log), indent=None)
    elif as_json:
        print_json({"as_of": page.as_of, "logs": [asdict(log) for log in page.logs], "next": page.next})
    elif page.logs:
        print_table(stdout(), _LOG_COLUMNS, [_log_row(log, page.as_of) for log in page.logs], header=first)


def _log_row(log: StoredLog, now: datetime) -> Sequence[RenderableType]:
    oldest = "" if log.oldest_at is None else ago(log.oldest_at, now)
    return [str(log.key), number(log.events), size(log.bytes), str(log.first), str(log.last), oldest]


@events.command()
@click.argument("names", nargs=-1, required=True, metavar="ID_OR_KEY|-")
@place_options
@click.option("--stream", metavar="NAME", help="Those of one stream, by the name that is shown.")
@_limit_option
@click.option(
    "--after",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    metavar="SEQUENCE",
    help="Go on after the event with this sequence.",
)
@_all_option
@click.option("--payloads", is_flag=True, help="The messages, too: they may be confidential.")
@json_option
def show(
    place: Place,
    *,
    names: tuple[str, ...],
    stream: str | None,
    limit: int | None,
    after: int,
    all_pages: bool,
    payloads: bool,
    as_json: bool,
) -> None:
    """Show the events of one session in their order, a page at a time.

    Of a message its method and its request id are told where it is not large. Exit code 1 when no events are stored for
    the session. --json prints one document: as_of, log, events, and next, which is the sequence for --after or null.
    With --all it prints one line of JSON for each event. Payloads are JSON texts, in --json too.
    """
    key = key_of(names)
    page_size = limit or (_LARGE_PAGE if all_pages else _PAGE)

    async def print_pages() -> None:
        count = 0
        async with place.event_directory() as directory:
            async for page in _pages_of(directory, key, stream=stream, limit=page_size, after=after, messages=payloads):
                if page is None:
                    raise Failure(
                        f"no events are stored for the key {key} in namespace {place.namespace}: there never were any, "
                        "or the session has ended"
                    )
                _print_events(page, first=count == 0, all_pages=all_pages, payloads=payloads, as_json=as_json)
                count += len(page.events)
                if not all_pages:
                    if page.next is not None and not as_json:
                        click.echo(f"there are more: --after {page.next}", err=True)
                    break
        if count == 0 and not as_json:
            click.echo(f"no events like that are kept for the key {key}", err=True)

    run(print_pages())


async def _pages_of(
    directory: EventDirectory, key: UUID, *, stream: str | None, limit: int, after: int, messages: bool
) -> AsyncIterator[LogDetails | None]:
    """The pages of a session's events, at least one; `None` where it has no log, or no longer."""
    while True:
        page = await directory.find(key, stream=stream, limit=limit, after=after, messages=messages)
        yield page
        if page is None or page.next is None:
            return
        after = page.next


_EVENT_COLUMNS: Final = (
    Column(title="SEQUENCE", width=8, right=True),
    Column(title="STREAM", width=12, flexible=True, rank=2),
    Column(title="POSITION", width=8, right=True, rank=4),
    Column(title="KIND", width=12),
    Column(title="STORED", width=10, rank=1),
    Column(title="BYTES", width=9, right=True, rank=3),
    Column(title="ABOUT", width=12, flexible=True),
)


def _print_events(page: LogDetails, *, first: bool, all_pages: bool, payloads: bool, as_json: bool) -> None:
    if as_json:
        listed = [_event_as_json(event, payloads=payloads) for event in page.events]
        if all_pages:
            for event in listed:
                print_json(event, indent=None)
        else:
            print_json({"as_of": page.as_of, "log": asdict(page.log), "events": listed, "next": page.next})
    elif payloads:
        _print_payloads(stdout(), page)
    elif page.events:
        rows = [_event_row(event, page.as_of) for event in page.events]
        print_table(stdout(), _EVENT_COLUMNS, rows, header=first)


def _event_row(event: LoggedEvent, now: datetime) -> Sequence[RenderableType]:
    return [
        cell(text)
        for text in (
            str(event.sequence),
            event.stream,
            str(event.position),
            event.kind,
            ago(event.created_at, now),
            size(event.bytes),
            _about(event),
        )
    ]


def _print_payloads(console: Console, page: LogDetails) -> None:
    for event in page.events:
        parts = [
            str(event.sequence),
            f"stream {event.stream}, position {event.position}, {event.kind}",
            f"{event.created_at:%Y-%m-%d %H:%M:%S} UTC, {size(event.bytes)}",
        ]
        console.print(cell("  ".join(parts), length=2000), soft_wrap=True)
        if event.message is not None:
            console.print(cell(event.message, length=len(event.message)), soft_wrap=True)


def _event_as_json(event: LoggedEvent, *, payloads: bool) -> dict[str, Any]:
    document = asdict(event)
    message = document.pop("message")
    document["method"], document["request_id"] = _method_and_id(event)
    return document | ({"message": message} if payloads else {})


def _about(event: LoggedEvent) -> str:
    method, request_id = _method_and_id(event)
    parts = [] if method is None else [method]
    if request_id is not None:
        parts.append(f"id {request_id}")
    return " ".join(parts)


def _method_and_id(event: LoggedEvent) -> tuple[str | None, str | int | None]:
    """What a message is about; nothing, for what is no message or was not read."""
    try:
        message = json.loads(event.message or "")
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(message, dict):
        return None, None
    method, request_id = message.get("method"), message.get("id")
    return method if isinstance(method, str) else None, request_id if isinstance(request_id, str | int) else None


@events.command()
@place_options
@click.option("--top", default=10, show_default=True, type=click.IntRange(1, 1000), help="Instances shown.")
@json_option
def stats(place: Place, *, top: int, as_json: bool) -> None:
    """Count the events, and tell what their tables take, which instances run, and which partitions there are.

    Reads what is noted for each session, and no event: those that were dropped with a partition count until the next
    sweep. Sizes, instances and partitions are those of all namespaces.
    """

    async def read() -> EventStatistics:
        async with place.event_directory() as directory:
            return await directory.statistics(top=top)

    statistics = run(read())
    if as_json:
        print_json(asdict(statistics))
    else:
        _print_statistics(stdout(), statistics)


def _print_statistics(console: Console, statistics: EventStatistics) -> None:
    now = statistics.as_of
    sessions = f"{number(statistics.sessions)} {plural('session', statistics.sessions)}"
    counted = f"{number(statistics.events)} {plural('event', statistics.events)}"
    oldest = "" if statistics.oldest_at is None else f", the oldest from {ago(statistics.oldest_at, now)}"
    click.echo(f"{counted} of {sessions}, {size(statistics.bytes)} of messages{oldest}")
    if statistics.index_bytes is None:
        click.echo(f"the database file takes {size(statistics.table_bytes)}")
    else:
        click.echo(f"tables take {size(statistics.table_bytes)}, indexes {size(statistics.index_bytes)}")
    if statistics.instances:
        click.echo()
        columns = (
            Column(title="INSTANCE", width=24, flexible=True),
            Column(title="STARTED", width=10, rank=1),
            Column(title="LAST BEAT", width=10),
        )
        rows = [
            [cell(text) for text in (one.instance, ago(one.started_at, now), ago(one.beat_at, now))]
            for one in statistics.instances
        ]
        print_table(console, columns, rows)
    if statistics.partitions:
        click.echo()
        partition_columns = (
            Column(title="PARTITION", width=33, rank=1),
            Column(title="FROM", width=16),
            Column(title="TO", width=16),
            Column(title="SIZE", width=9, right=True),
        )
        print_table(console, partition_columns, [_partition_row(one) for one in statistics.partitions])


def _partition_row(partition: Partition) -> Sequence[RenderableType]:
    def when(moment: datetime | None) -> str:
        return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"

    return [cell(partition.name), when(partition.since), when(partition.until), size(partition.size)]


_ahead_option = click.option(
    "--ahead", type=click.IntRange(1, 20), default=3, show_default=True, help="Partitions made before their time."
)


@events.command()
@tables_options
@click.option(
    "--every",
    type=DURATION,
    required=True,
    metavar="DURATION",
    help="How long a time a partition is for, as in 10m, 1h, 1d; from multiples of it on, in UTC.",
)
@events_max_age_option
@_ahead_option
def partition(place: Place, *, every: timedelta, events_max_age: str | None, ahead: int) -> None:
    """Partition the events of all namespaces by time, on Postgres: old ones are dropped, and no longer deleted.

    One transaction; the events stay. Nobody stores or reads one while an index on the present ones is built. From then
    on run `events maintain` regularly, more often than a partition is long.
    """

    async def change() -> bool:
        async with place.event_partitions() as partitions:
            return await partitions.partition(every, max_age=_max_age(events_max_age), ahead=ahead)

    done = run(change())
    click.echo("the events are partitioned" if done else "the events were partitioned like that before")


@events.command()
@tables_options
@events_max_age_option
@_ahead_option
@json_option
def maintain(place: Place, *, events_max_age: str | None, ahead: int, as_json: bool) -> None:
    """Drop the partitions whose events are all older than --events-max-age, and make those of times to come.

    For cron. It may run at any time, twice at once too. Give it the --events-max-age of the servers, of several
    namespaces the longest.
    """

    async def change() -> Maintenance:
        async with place.event_partitions() as partitions:
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
            "the default partition holds events, for whose time there was no other: sweeps delete them one by one. "
            "Run this more often, or with a larger --ahead",
            err=True,
        )


@events.command()
@tables_options
def unpartition(place: Place) -> None:
    """Make the events one table again.

    One transaction; the events stay. Nobody stores or reads one while they are copied: give many a longer --timeout.
    """

    async def change() -> bool:
        async with place.event_partitions() as partitions:
            return await partitions.unpartition()

    click.echo("the events are one table again" if run(change()) else "the events were not partitioned")


def _max_age(text: str | None) -> timedelta | None:
    return read_settings(EventPolicy, {} if text is None else {"max_age": text}).max_age
