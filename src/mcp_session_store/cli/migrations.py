"""The commands that migrate a database, and that show its revision."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

import click

from mcp_session_store.cli.options import DURATION_OR_SECONDS, Failure, json_option, run, schema_option, url_option
from mcp_session_store.cli.output import Column, number, plural, print_json, print_table
from mcp_session_store.cli.target import tables_options
from mcp_session_store.errors import ConfigurationError, SchemaBehind, SchemaMissing, StoreBusy, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from mcp_session_store.cli.target import Target
    from mcp_session_store.errors import SessionStoreError
    from mcp_session_store.sql.admin.rows import UnreadableRow

CHECK_AGAIN: Final = 1.0
"""Seconds from one check that waits to the next."""

# Alembic is imported by the commands that need it.

__all__ = ["check", "current", "downgrade", "upgrade"]


@click.command()
@click.argument("revision", default="head")
@url_option
@schema_option
@click.option("--sql", is_flag=True, help="Print the SQL, and touch no database.")
@click.option("--from", "from_revision", metavar="REVISION", help="With --sql: the revision to start from.")
def upgrade(revision: str, url: str, schema: str | None, sql: bool, from_revision: str | None) -> None:
    """Bring the database's schema to REVISION (default: head).

    Safe when many replicas run it at once: one migrates, and the others wait until it has.
    """
    from mcp_session_store.sql.schema import migrate

    if sql:
        click.echo(migrate.upgrade_sql(url, schema=schema, revision=revision, from_revision=from_revision))
        return
    if from_revision is not None:
        raise click.UsageError("--from goes with --sql: a database knows its own revision")

    async def go() -> str | None:
        await migrate.upgrade(url, schema=schema, revision=revision)
        return await migrate.current(url, schema=schema)

    click.echo(f"the schema is at {run(go())}")


@click.command()
@click.argument("revision")
@url_option
@schema_option
@click.option("--yes", is_flag=True, help="Remove tables without a question.")
def downgrade(revision: str, url: str, schema: str | None, *, yes: bool) -> None:
    """Take the database's schema back to REVISION.

    `base` removes all tables, and with them all sessions of all namespaces. It leaves the table in which the revision
    is noted, which is empty then, the schema that --schema names, and SQLite's file. What goes and what stays is said
    before tables are removed.
    """
    from mcp_session_store.sql.schema import migrate

    removed, sessions = run(migrate.tables_removed(url, schema=schema, revision=revision))
    if removed and not yes:
        _ask(removed, sessions, url, schema)

    async def go() -> str | None:
        await migrate.downgrade(url, schema=schema, revision=revision)
        return await migrate.current(url, schema=schema)

    found = run(go())
    click.echo("the schema is removed" if found is None else f"the schema is at {found}")


def _ask(removed: Sequence[str], sessions: int, url: str, schema: str | None) -> None:
    from mcp_session_store.sql.engine import checked_url, shown_url
    from mcp_session_store.sql.schema.tables import VERSION_TABLE

    parsed, dialect = checked_url(url)
    place = shown_url(parsed) if schema is None else f"{shown_url(parsed)}, schema {schema}"
    counted = f", with {number(sessions)} {plural('session', sessions)}" if sessions else ""
    stays = f"the table {VERSION_TABLE}, and the {'schema' if dialect.has_schemas else 'file'}"
    text = f"{place}: {', '.join(removed)} would be removed{counted}; {stays}, would stay"
    if not sys.stdin.isatty():
        raise click.UsageError(f"{text}. Without a terminal there is no question; give --yes to remove them")
    click.echo(text, err=True)
    click.confirm("Remove them for good?", abort=True, err=True)


@click.command()
@url_option
@schema_option
def current(url: str, schema: str | None) -> None:
    """Print the revision of the database's schema, or `none`."""
    from mcp_session_store.sql.schema import migrate

    click.echo(run(migrate.current(url, schema=schema)) or "none")


@click.command(short_help="Check that the schema fits, and that rows can be read.")
@tables_options
@click.option(
    "--rows",
    is_flag=True,
    help="Read all stored sessions, too, of all namespaces, and list the rows that cannot be read; not the events.",
)
@click.option(
    "--wait",
    type=DURATION_OR_SECONDS,
    metavar="SECONDS|DURATION",
    help="Wait at most so long for a database that is away, a file that is not there yet, or a schema to be migrated.",
)
@json_option
def check(target: Target, *, rows: bool, wait: timedelta | None, as_json: bool) -> None:
    """Check that the database's schema fits this version of the package; with --rows, that its rows can be read.

    With --wait it suits a container that starts before the server's: it waits for what others are about to set right, a
    database that starts, a SQLite file and a migration that runs beside it, and fails at once where waiting would not
    help, as with a wrong password.

    Exit code 1, with what to do, when it does not, or when a row cannot be read. A session whose row cannot be read, as
    after a change by hand or in a damaged file, is answered as an unknown one, and concerns no other.
    """
    from mcp_session_store.sql.schema import migrate

    if as_json and not rows:
        raise click.UsageError("--json goes with --rows")
    if wait is None:
        run(migrate.check(target.url, schema=target.schema, timeout=target.timeout))
    else:
        run(_check_within(wait.total_seconds(), target))
    if not rows:
        click.echo("the schema fits")
        return

    async def read() -> list[UnreadableRow]:
        async with target.row_check() as check:
            return await check.unreadable()

    found = run(read())
    if as_json:
        print_json({"unreadable": [asdict(row) for row in found]})
    elif found:
        columns = [Column(title=title, width=width) for title, width in _ROW_COLUMNS.items()]
        print_table(columns, [_row_cells(row) for row in found])
    else:
        click.echo("the schema fits, and all rows can be read")
    if found:
        raise Failure(f"{number(len(found))} {plural('row', len(found))} cannot be read. {_remedy(target, found)}")


def _remedy(target: Target, found: Sequence[UnreadableRow]) -> str:
    repair = "Repair them in the database; a row without a key can only be deleted there"
    live = next((row for row in found if row.live and row.key is not None and row.namespace is not None), None)
    if live is None:
        return repair
    advice = replace(target, namespace=live.namespace or "").advice(f"sessions end {live.key}")
    return f"{repair}. Or end a live session, as this one: {advice}"


async def _check_within(seconds: float, target: Target) -> None:
    """Check the schema until it fits, or until the time is over."""
    import asyncio

    from mcp_session_store.sql.schema import migrate

    failure: SessionStoreError = StoreUnavailable(f"the database did not answer within {seconds:g} s")
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await migrate.check(target.url, schema=target.schema, timeout=target.timeout)
                except (StoreUnavailable, StoreBusy, SchemaMissing, SchemaBehind, ConfigurationError) as error:
                    if isinstance(error, ConfigurationError) and not target.is_absent():
                        raise
                    if str(error) != str(failure):
                        click.echo(f"waiting: {error}", err=True)
                    failure = error
                await asyncio.sleep(CHECK_AGAIN)
    except TimeoutError:
        raise failure from None


_ROW_COLUMNS: Final = {"TABLE": 20, "KEY": 36, "NAMESPACE": 12, "STATE": 5, "CANNOT BE READ": 20}


def _row_cells(row: UnreadableRow) -> list[str]:
    state = "live" if row.live else ""
    return [row.table, str(row.key or ""), row.namespace or "", state, ", ".join(row.columns)]
