"""The command that copies sessions from one database to another."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mcp_session_store.cli.options import json_option, option, run
from mcp_session_store.cli.output import number, plural, print_json, progress
from mcp_session_store.cli.target import timeout_option

if TYPE_CHECKING:
    from mcp_session_store.sql.admin.copying import CopyReport

__all__ = ["copy"]


@click.command(short_help="Copy sessions to another database.")
@option("--from", parameter="source", required=True, metavar="URL", help="Database with the sessions.")
@option("--to", parameter="destination", required=True, metavar="URL", help="Database to copy them to.")
@option("--from-schema", metavar="NAME", help="Schema with the tables of --from, on Postgres.")
@option("--to-schema", metavar="NAME", help="Schema with the tables of --to, on Postgres.")
@option("--namespace", metavar="NAME", help="Copy the sessions of one namespace only, not of all.")
@click.option("--dry-run", is_flag=True, help="Print what a copy would do, and do nothing.")
@timeout_option
@json_option
def copy(
    source: str,
    destination: str,
    from_schema: str | None,
    to_schema: str | None,
    namespace: str | None,
    *,
    dry_run: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Copy the live sessions of a database, with their journals and their state, to another, of either kind.

    The values that belong to no session (SqlKeyValue) are copied with them.

    Both need the schema of this version. It can be run again at any time, and goes on where it was stopped: sessions
    that are there already are brought up to date, those that have ended end there, and those that were used there since
    stay as they are. To move a server without its clients noticing more than a restart: copy while it runs, stop it,
    copy again, which takes what has changed, and start it on the other database.

    Events are not copied: a call whose answer its client has not received ends with an error when the client resumes.
    """
    from mcp_session_store.sql.admin.copying import SessionCopy
    from mcp_session_store.sql.engine import checked_url, refuse_absent

    refuse_absent(*checked_url(source))

    async def go() -> CopyReport:
        async with SessionCopy(
            source,
            destination,
            namespace=namespace,
            source_schema=from_schema,
            destination_schema=to_schema,
            timeout=timeout,
            dry_run=dry_run,
        ) as copying:
            with progress("copying", total=await copying.count()) as advance:
                return await copying.run(advance)

    report = run(go())
    if as_json:
        print_json({"dry_run": dry_run, **asdict(report)})
        return
    would = "would be " if dry_run else ""
    counts = {
        f"{would}copied": report.copied,
        f"{would}updated": report.updated,
        "unchanged": report.unchanged,
        "newer there": report.newer,
        f"{would}ended there": report.ended,
    }
    click.echo(f"sessions: {', '.join(f'{number(count)} {what}' for what, count in counts.items())}")
    if report.values:
        what = plural("value", report.values)
        click.echo(
            f"{number(report.values)} {what} of no session {would or ('was ' if report.values == 1 else 'were ')}copied"
        )
    if len(report.namespaces) > 1:
        listed = (f"{name} {number(count)}" for name, count in sorted(report.namespaces.items()))
        click.echo(f"live ones by namespace: {', '.join(listed)}")
    if report.unreadable:
        click.echo(
            f"{number(report.unreadable)} {plural('session', report.unreadable)} cannot be read and "
            f"{'was' if report.unreadable == 1 else 'were'} left out; check --rows lists them",
            err=True,
        )
    if report.running and not dry_run:
        click.echo(
            f"{number(report.running)} {plural('instance', report.running)} ran on the source; when "
            f"{'it has' if report.running == 1 else 'they have'} stopped, copy again for what has changed",
            err=True,
        )
