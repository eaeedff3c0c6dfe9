"""The commands for stored sessions: list them, show one, end some, count them."""

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
)
from mcp_session_store.cli.pages import (
    LARGE_PAGE,
    all_option,
    cursor_option,
    limit_option,
    page_size,
    pages,
    print_pages,
)
from mcp_session_store.cli.session_names import key_of, keys_of
from mcp_session_store.cli.sessions_views import (
    details_as_json,
    print_details,
    print_page,
    print_statistics,
    statistics_as_json,
)
from mcp_session_store.cli.target import target_options
from mcp_session_store.records import EndReason, Principal
from mcp_session_store.retention import RetentionPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.cli.target import Target
    from mcp_session_store.retention import SweepReport
    from mcp_session_store.sql.admin.sessions import (
        SessionDetails,
        SessionDirectory,
        SessionFilter,
        SessionPage,
        Statistics,
    )

__all__ = ["sessions"]

_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


@click.group(cls=Group)
def sessions() -> None:
    """List, show, end and count the sessions that are stored.

    A session is named by its key, as `list` prints it: a UUID of version 8, with dashes. Its first digits will do where
    no other key begins with them. Any other name is taken for a session id, which is hashed at once, and never printed
    or stored. A name of - stands for those on the standard input, so that a session id need not stand in the shell's
    history.
    """


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose sessions; the command gets a `SessionFilter` as `which`."""

    @click.option("--client", metavar="NAME", help="Name that the client gave itself, exactly.")
    @click.option(
        "--principal", metavar="CLIENT_ID", help="Client id of the principal, or the digest that show prints."
    )
    @click.option("--issuer", metavar="URL", help="With --principal: its issuer, if it has one.")
    @click.option("--subject", metavar="NAME", help="With --principal: its subject, if it has one.")
    @click.option("--no-principal", is_flag=True, help="Sessions without a principal.")
    @click.option("--instance", metavar="ID", help="Instance that last created or restored the session.")
    @click.option(
        "--older-than",
        type=DURATION,
        metavar="DURATION",
        help="Opened at least so long ago, as in 90s, 30m, 24h, 7d; with --state: expired or ended so long ago.",
    )
    @click.option("--newer-than", type=DURATION, metavar="DURATION", help="Opened, expired or ended less long ago.")
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
@target_options
@click.option(
    "--state",
    type=click.Choice(["live", "expired", "ended"]),
    default="live",
    show_default=True,
    help="live: newest first. expired, and not yet swept, and ended: latest first.",
)
@_filter_options
@limit_option
@cursor_option
@all_option
@json_option
def list_(
    target: Target,
    *,
    state: str,
    which: SessionFilter,
    limit: int | None,
    after: str | None,
    all_pages: bool,
    as_json: bool,
) -> None:
    """List sessions, a page at a time.

    Ages are by the database's clock. --json prints one document with as_of, sessions and next, which is the cursor for
    --after or null; with --all, one line of JSON for each session.
    """
    from mcp_session_store.sql.admin.sessions import SessionState

    which = replace(which, state=SessionState(state))
    size = page_size(limit, all_pages=all_pages)

    def show_page(page: SessionPage, first: bool) -> int:
        print_page(page, state, first=first, all_pages=all_pages, as_json=as_json)
        return len(page.sessions)

    async def print_list() -> None:
        async with target.directory() as directory:
            listed = _listed(directory, which, size=size, after=after)
            count = await print_pages(listed, show_page, all_pages=all_pages, as_json=as_json)
        if count == 0 and not as_json:
            click.echo(f"no {state} sessions like that in namespace {target.namespace}", err=True)

    run(print_list())


def _listed(
    directory: SessionDirectory, which: SessionFilter, *, size: int = LARGE_PAGE, after: str | None = None
) -> AsyncIterator[SessionPage]:
    async def read(cursor: str | None) -> SessionPage:
        return await directory.page(which, limit=size, after=cursor)

    return pages(read, after)


@sessions.command()
@click.argument("names", nargs=-1, required=True, metavar="ID_OR_KEY|-")
@target_options
@click.option("--params", is_flag=True, help="Show the client's params, which may be confidential.")
@click.option("--values", is_flag=True, help="Show the values of its state, which may be confidential.")
@json_option
def show(target: Target, *, names: tuple[str, ...], params: bool, values: bool, as_json: bool) -> None:
    """Show all that is stored of one session, live or not.

    Exit code 1 when there is no such session. Params and values are JSON texts, in --json too.
    """
    key = key_of(target, names)

    async def find() -> SessionDetails | None:
        async with target.directory() as directory:
            return await directory.find(key)

    found = run(find())
    if found is None:
        raise Failure(
            f"no session has the key {key} in namespace {target.namespace}: it never had, or it ended and was swept"
        )
    if as_json:
        print_json(details_as_json(found, params=params, values=values))
    else:
        print_details(found, params=params, values=values)


@sessions.command()
@click.argument("names", nargs=-1, metavar="[ID_OR_KEY|-]...")
@target_options
@_filter_options
@click.option("--all", "all_sessions", is_flag=True, help="End all live sessions of the namespace.")
@click.option("--yes", is_flag=True, help="End them without a question.")
@click.option("--dry-run", is_flag=True, help="Print how many would end, and end none.")
@json_option
def end(
    target: Target,
    *,
    names: tuple[str, ...],
    which: SessionFilter,
    all_sessions: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """End sessions for good, on all instances: named sessions, or all live ones that the options choose.

    Exit code 1 when a session that was named was not live.
    """
    from mcp_session_store.sql.admin.sessions import SessionFilter

    filtered = which != SessionFilter()
    if bool(names) + filtered + all_sessions != 1:
        raise click.UsageError("name sessions, or choose them with options, or give --all: one of the three")
    not_live: list[UUID] = []
    if names:
        keys = keys_of(target, names)
        live = run(_live(target, keys)) if dry_run else run(_end_named(target, keys))
        ended = len(live)
        not_live = [key for key in keys if key not in live]
    else:
        ended = run(_count(target, which))
        if not dry_run and ended:
            if not yes:
                _ask(ended, target)
            ended = run(_end_chosen(target, which, expected=ended))
    if as_json:
        print_json({"dry_run": dry_run, "ended": ended, "not_live": not_live})
    else:
        click.echo(f"{number(ended)} {plural('session', ended)} {'would end' if dry_run else 'ended'}")
        for key in not_live:
            click.echo(f"not live: {key}", err=True)
    if not_live:
        raise click.exceptions.Exit(1)


def _ask(count: int, target: Target) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{number(count)} {plural('session', count)} would end, and without a terminal there is no question; "
            "give --yes to end them, or --dry-run"
        )
    question = f"End {number(count)} live {plural('session', count)} in namespace {target.namespace}?"
    click.confirm(question, abort=True, err=True)


async def _count(target: Target, which: SessionFilter) -> int:
    async with target.directory() as directory:
        return await directory.count(which)


async def _live(target: Target, keys: Sequence[UUID]) -> set[UUID]:
    from mcp_session_store.sql.admin.sessions import SessionState

    async with target.directory() as directory:
        found = [await directory.find(key) for key in keys]
    return {one.session.key for one in found if one is not None and one.session.state is SessionState.LIVE}


async def _end_named(target: Target, keys: Sequence[UUID]) -> set[UUID]:
    """End sessions, and return the keys of those that were live."""
    ended: set[UUID] = set()
    async with target.store() as store:
        for start in range(0, len(keys), LARGE_PAGE):
            some = keys[start : start + LARGE_PAGE]
            answers = await asyncio.gather(*(store.end(key, reason=EndReason.OPERATOR) for key in some))
            ended.update(key for key, answer in zip(some, answers, strict=True) if answer)
    return ended


async def _end_chosen(target: Target, which: SessionFilter, *, expected: int) -> int:
    """End the sessions of a filter, and return how many.

    Hardly any session that is opened meanwhile is among them, because the list goes from new to old.
    """
    ended = 0
    async with target.directory() as directory, target.store() as store:
        with progress("ending", total=expected) as advance:
            async for page in _listed(directory, which):
                answers = await asyncio.gather(
                    *(store.end(session.key, reason=EndReason.OPERATOR) for session in page.sessions)
                )
                ended += sum(answers)
                advance(len(answers))
    return ended


@sessions.command()
@target_options
@click.option("--top", default=10, show_default=True, type=click.IntRange(1, 1000), help="Clients and instances shown.")
@retention_options
@json_option
def stats(target: Target, *, top: int, retention: Mapping[str, str], as_json: bool) -> None:
    """Count the sessions by state, age, client and instance, and show the size of their tables.

    Reads all sessions, and blocks no server; give a large table a longer --timeout. The next sweep's figures follow
    the policy of the options, so give those that the servers have.
    """
    policy = read_settings(RetentionPolicy, retention)

    async def read() -> tuple[Statistics, SweepReport]:
        async with target.directory() as directory:
            return await directory.statistics(top=top), await directory.preview(policy)

    statistics, preview = run(read())
    if as_json:
        print_json(statistics_as_json(statistics, preview))
    else:
        print_statistics(statistics, preview)
