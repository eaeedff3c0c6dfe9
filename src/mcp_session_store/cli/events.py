"""The commands for the events that are stored: whose they are, what they are, and how their table is laid out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from mcp_session_store.cli.events_views import print_events, print_page, print_statistics
from mcp_session_store.cli.options import (
    Failure,
    Group,
    json_option,
    run,
)
from mcp_session_store.cli.output import (
    print_json,
    stdout,
)
from mcp_session_store.cli.partitions import maintain, partition, unpartition
from mcp_session_store.cli.session_names import key_of
from mcp_session_store.cli.target import place_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from mcp_session_store.cli.target import Place
    from mcp_session_store.sql.admin.events import (
        EventDirectory,
        EventStatistics,
        LogDetails,
        LogPage,
    )

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
                print_page(page, first=count == 0, all_pages=all_pages, as_json=as_json)
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
                print_events(page, first=count == 0, all_pages=all_pages, payloads=payloads, as_json=as_json)
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
        print_statistics(stdout(), statistics)


for command in (partition, maintain, unpartition):
    events.add_command(command)
