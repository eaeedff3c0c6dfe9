"""The commands for stored events: list their sessions, show those of one session, count them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

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
)
from mcp_session_store.cli.pages import all_option, cursor_option, limit_option, page_size, pages, print_pages
from mcp_session_store.cli.partitions import maintain, partition, unpartition
from mcp_session_store.cli.session_names import key_of
from mcp_session_store.cli.target import target_options

if TYPE_CHECKING:
    from mcp_session_store.cli.target import Target
    from mcp_session_store.sql.admin.events import (
        EventStatistics,
        LogDetails,
        LogPage,
    )

__all__ = ["events"]


@click.group(cls=Group, short_help="List, show and count stored events, and partition them.")
def events() -> None:
    """List, show and count the events that are stored for streams that resume, and partition their table.

    A session is named as by the commands under `sessions`.
    """


@events.command("list")
@target_options
@limit_option
@cursor_option
@all_option
@json_option
def list_(target: Target, *, limit: int | None, after: str | None, all_pages: bool, as_json: bool) -> None:
    """List the sessions that have events, those with the oldest first, a page at a time.

    Bytes are those of the messages. Ages are by the database's clock. --json prints one document with as_of, logs and
    next, which is the cursor for --after or null; with --all, one line of JSON for each session.
    """
    size = page_size(limit, all_pages=all_pages)

    def show_page(page: LogPage, first: bool) -> int:
        print_page(page, first=first, all_pages=all_pages, as_json=as_json)
        return len(page.logs)

    async def print_list() -> None:
        async with target.event_directory() as directory:

            async def read(cursor: str | None) -> LogPage:
                return await directory.page(limit=size, after=cursor)

            count = await print_pages(pages(read, after), show_page, all_pages=all_pages, as_json=as_json)
        if count == 0 and not as_json:
            click.echo(f"no session in namespace {target.namespace} has events", err=True)

    run(print_list())


@events.command()
@click.argument("names", nargs=-1, required=True, metavar="ID_OR_KEY|-")
@target_options
@click.option("--stream", metavar="NAME", help="Show one stream alone, by the name that is shown.")
@limit_option
@click.option(
    "--after",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    metavar="SEQUENCE",
    help="Go on after the event with this sequence.",
)
@all_option
@click.option("--payloads", is_flag=True, help="Show the messages, which may be confidential.")
@json_option
def show(
    target: Target,
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

    The method and the request id of a message are shown unless the message is large. Exit code 1 when no events are
    stored for the session. --json prints one document with as_of, log, events and next, which is the sequence for
    --after or null; with --all, one line of JSON for each event. Payloads are JSON texts, in --json too.
    """
    key = key_of(target, names)
    size = page_size(limit, all_pages=all_pages)

    def show_page(page: LogDetails, first: bool) -> int:
        print_events(page, first=first, all_pages=all_pages, payloads=payloads, as_json=as_json)
        return len(page.events)

    async def print_list() -> None:
        async with target.event_directory() as directory:

            async def read(sequence: int) -> LogDetails:
                page = await directory.find(key, stream=stream, limit=size, after=sequence, messages=payloads)
                if page is None:
                    raise Failure(
                        f"no events are stored for the key {key} in namespace {target.namespace}: there never were "
                        "any, or the session has ended"
                    )
                return page

            count = await print_pages(pages(read, after), show_page, all_pages=all_pages, as_json=as_json)
        if count == 0 and not as_json:
            click.echo(f"no events like those are stored for the key {key}", err=True)

    run(print_list())


@events.command()
@target_options
@click.option("--top", default=10, show_default=True, type=click.IntRange(1, 1000), help="Instances shown.")
@json_option
def stats(target: Target, *, top: int, as_json: bool) -> None:
    """Count the events, and show the size of their tables, the instances that run, and the partitions.

    The count is the sum of what is noted for each session; no event is read. Events that were dropped with a partition
    count until the next sweep. Sizes, instances and partitions are those of all namespaces.
    """

    async def read() -> EventStatistics:
        async with target.event_directory() as directory:
            return await directory.statistics(top=top)

    statistics = run(read())
    if as_json:
        print_json(asdict(statistics))
    else:
        print_statistics(statistics)


for command in (partition, maintain, unpartition):
    events.add_command(command)
