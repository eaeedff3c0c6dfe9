"""The commands for the sessions that are stored: list them, show one, end some, count them."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from mcp_session_store.cli.options import (
    DURATION,
    Failure,
    Group,
    json_option,
    read_settings,
    retention_options,
    run,
)
from mcp_session_store.cli.output import (
    number,
    plural,
    print_json,
    progress,
    stdout,
)
from mcp_session_store.cli.session_names import key_of, keys_of
from mcp_session_store.cli.sessions_views import (
    details_as_json,
    print_details,
    print_page,
    print_statistics,
    statistics_as_json,
)
from mcp_session_store.cli.target import place_options
from mcp_session_store.records import EndReason, Principal
from mcp_session_store.retention import RetentionPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.cli.target import Place
    from mcp_session_store.retention import SweepReport
    from mcp_session_store.sql.admin.sessions import (
        SessionDetails,
        SessionDirectory,
        SessionFilter,
        SessionPage,
        Statistics,
    )

__all__ = ["sessions"]

_PAGE: Final = 50
_LARGE_PAGE: Final = 500

_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


@click.group(cls=Group)
def sessions() -> None:
    """List, show, end and count the sessions that are stored.

    A session is named by its key, as it is listed: a UUID of version 8, with dashes. Anything else is taken for
    a session id, which is hashed at once, and never printed or stored. With - it is read from the standard input, so
    that it does not stand in the shell's history.
    """


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose sessions; the command gets a `SessionFilter` as `which`."""

    @click.option("--client", metavar="NAME", help="What the client calls itself, exactly.")
    @click.option("--principal", metavar="CLIENT_ID", help="Whose: a client id, or a digest as show prints it.")
    @click.option("--issuer", metavar="URL", help="With --principal: its issuer, where it has one.")
    @click.option("--subject", metavar="NAME", help="With --principal: its subject, where it has one.")
    @click.option("--no-principal", is_flag=True, help="Those that are nobody's.")
    @click.option("--instance", metavar="ID", help="The instance that last created or restored it.")
    @click.option(
        "--older-than",
        type=DURATION,
        metavar="DURATION",
        help="Opened that long ago or longer, as in 90s, 30m, 24h, 7d; with --state: expired or ended.",
    )
    @click.option("--newer-than", type=DURATION, metavar="DURATION", help="Less long ago than that.")
    @functools.wraps(command)
    def with_filter(
        *arguments: Any,
        client: str | None,
        principal: str | None,
        issuer: str | None,
        subject: str | None,
        no_principal: bool,
        instance: str | None,
        older_than: timedelta | None,
        newer_than: timedelta | None,
        **others: Any,
    ) -> None:
        from mcp_session_store.sql.admin.sessions import SessionFilter

        if no_principal and principal is not None:
            raise click.UsageError("--principal and --no-principal exclude each other; give one of them")
        if older_than is not None and newer_than is not None and older_than >= newer_than:
            raise click.UsageError("nothing is older than --older-than and newer than --newer-than; exchange the two")
        which = SessionFilter(
            client=client,
            principal=_digest(principal, issuer, subject),
            anonymous=no_principal,
            instance=instance,
            min_age=older_than,
            max_age=newer_than,
        )
        command(*arguments, which=which, **others)

    return with_filter


def _digest(principal: str | None, issuer: str | None, subject: str | None) -> bytes | None:
    if principal is None:
        if issuer is not None or subject is not None:
            raise click.UsageError("--issuer and --subject go with --principal CLIENT_ID")
        return None
    if _DIGEST.fullmatch(principal):
        if issuer is not None or subject is not None:
            raise click.UsageError("a digest says all of a principal; leave out --issuer and --subject")
        return bytes.fromhex(principal)
    return Principal.of(client_id=principal, issuer=issuer, subject=subject).digest


@sessions.command("list")
@place_options
@click.option(
    "--state",
    type=click.Choice(["live", "expired", "ended"]),
    default="live",
    show_default=True,
    help="Newest first; or expired and not yet swept, or ended, the latest first.",
)
@_filter_options
@click.option("--limit", type=click.IntRange(1, 10_000), metavar="N", help=f"Sessions on a page. Default: {_PAGE}.")
@click.option("--after", metavar="CURSOR", help="Go on where a page ended, with what it printed.")
@click.option("--all", "all_pages", is_flag=True, help="All pages, one after the other.")
@json_option
def list_(
    place: Place,
    *,
    state: str,
    which: SessionFilter,
    limit: int | None,
    after: str | None,
    all_pages: bool,
    as_json: bool,
) -> None:
    """List sessions, a page at a time.

    Ages are by the database's clock. --json prints one document: as_of, sessions, and next, which is the cursor for
    --after or null. With --all it prints one line of JSON for each session.
    """
    from mcp_session_store.sql.admin.sessions import SessionState

    which = replace(which, state=SessionState(state))
    page_size = limit or (_LARGE_PAGE if all_pages else _PAGE)

    async def print_pages() -> None:
        count = 0
        async with place.directory() as directory:
            async for page in _pages(directory, which, limit=page_size, after=after):
                print_page(page, state, first=count == 0, all_pages=all_pages, as_json=as_json)
                count += len(page.sessions)
                if not all_pages:
                    if page.next is not None and not as_json:
                        click.echo(f"there are more: --after {page.next}", err=True)
                    break
        if count == 0 and not as_json:
            click.echo(f"no {state} sessions like that in namespace {place.namespace}", err=True)

    run(print_pages())


async def _pages(
    directory: SessionDirectory, which: SessionFilter, *, limit: int = _LARGE_PAGE, after: str | None = None
) -> AsyncIterator[SessionPage]:
    """The pages of a list, at least one."""
    while True:
        page = await directory.page(which, limit=limit, after=after)
        yield page
        if page.next is None:
            return
        after = page.next


@sessions.command()
@click.argument("names", nargs=-1, required=True, metavar="ID_OR_KEY|-")
@place_options
@click.option("--params", is_flag=True, help="The client's params, too: they may be confidential.")
@json_option
def show(place: Place, *, names: tuple[str, ...], params: bool, as_json: bool) -> None:
    """Show all that is stored of one session, live or not.

    Exit code 1 when there is no such session. Params are JSON texts, in --json too.
    """
    key = key_of(names)

    async def find() -> SessionDetails | None:
        async with place.directory() as directory:
            return await directory.find(key)

    found = run(find())
    if found is None:
        raise Failure(
            f"no session has the key {key} in namespace {place.namespace}: it never had, or it ended and was swept"
        )
    if as_json:
        print_json(details_as_json(found, params=params))
    else:
        print_details(stdout(), found, params=params)


@sessions.command()
@click.argument("names", nargs=-1, metavar="[ID_OR_KEY|-]...")
@place_options
@_filter_options
@click.option("--all", "all_sessions", is_flag=True, help="All live sessions of the namespace.")
@click.option("--yes", is_flag=True, help="Ask nothing.")
@click.option("--dry-run", is_flag=True, help="Only tell how many would end.")
@json_option
def end(
    place: Place,
    *,
    names: tuple[str, ...],
    which: SessionFilter,
    all_sessions: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """End sessions for good, on all instances: those that are named, or all live ones that the options choose.

    Exit code 1 when a session that was named was not live.
    """
    from mcp_session_store.sql.admin.sessions import SessionFilter

    filtered = which != SessionFilter()
    if bool(names) + filtered + all_sessions != 1:
        raise click.UsageError("name sessions, or choose them with options, or give --all: one of the three")
    not_live: list[UUID] = []
    if names:
        keys = keys_of(names)
        live = run(_live(place, keys)) if dry_run else run(_end_named(place, keys))
        ended = len(live)
        not_live = [key for key in keys if key not in live]
    else:
        ended = run(_count(place, which))
        if not dry_run and ended:
            if not yes:
                _ask(ended, place)
            ended = run(_end_chosen(place, which, expected=ended))
    if as_json:
        print_json({"dry_run": dry_run, "ended": ended, "not_live": not_live})
    else:
        click.echo(f"{number(ended)} {plural('session', ended)} {'would end' if dry_run else 'ended'}")
        for key in not_live:
            click.echo(f"not live: {key}", err=True)
    if not_live:
        raise click.exceptions.Exit(1)


def _ask(count: int, place: Place) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{number(count)} {plural('session', count)} would end, and there is nobody to ask; "
            "give --yes to end them, or --dry-run"
        )
    question = f"End {number(count)} live {plural('session', count)} in namespace {place.namespace}?"
    click.confirm(question, abort=True, err=True)


async def _count(place: Place, which: SessionFilter) -> int:
    async with place.directory() as directory:
        return await directory.count(which)


async def _live(place: Place, keys: Sequence[UUID]) -> set[UUID]:
    from mcp_session_store.sql.admin.sessions import SessionState

    async with place.directory() as directory:
        found = [await directory.find(key) for key in keys]
    return {one.session.key for one in found if one is not None and one.session.state is SessionState.LIVE}


async def _end_named(place: Place, keys: Sequence[UUID]) -> set[UUID]:
    """Those among them that were live, and have ended."""
    ended: set[UUID] = set()
    async with place.store() as store:
        for start in range(0, len(keys), _LARGE_PAGE):
            some = keys[start : start + _LARGE_PAGE]
            answers = await asyncio.gather(*(store.end(key, reason=EndReason.OPERATOR) for key in some))
            ended.update(key for key, answer in zip(some, answers, strict=True) if answer)
    return ended


async def _end_chosen(place: Place, which: SessionFilter, *, expected: int) -> int:
    """How many ended. Of those that are opened meanwhile hardly any is among them: the list goes from new to old."""
    ended = 0
    async with place.directory() as directory, place.store() as store:
        with progress("ending", total=expected) as advance:
            async for page in _pages(directory, which):
                answers = await asyncio.gather(
                    *(store.end(session.key, reason=EndReason.OPERATOR) for session in page.sessions)
                )
                ended += sum(answers)
                advance(len(answers))
    return ended


@sessions.command()
@place_options
@click.option("--top", default=10, show_default=True, type=click.IntRange(1, 1000), help="Clients and instances shown.")
@retention_options
@json_option
def stats(place: Place, *, top: int, retention: Mapping[str, str], as_json: bool) -> None:
    """Count the sessions, by state, age, client and instance, and tell what they take.

    Reads all of them, changes none, and holds up nobody; give a large table a longer --timeout. What the next sweep
    would take is by the policy of the options, so give those that the servers have.
    """
    policy = read_settings(RetentionPolicy, retention)

    async def read() -> tuple[Statistics, SweepReport]:
        async with place.directory() as directory:
            return await directory.statistics(top=top), await directory.preview(policy)

    statistics, preview = run(read())
    if as_json:
        print_json(statistics_as_json(statistics, preview))
    else:
        print_statistics(stdout(), statistics, preview)
