"""The commands that migrate a database, and that show its revision."""

from __future__ import annotations

import click

from mcp_session_store.cli.options import run, schema_option, url_option

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
def downgrade(revision: str, url: str, schema: str | None) -> None:
    """Take the database's schema back to REVISION.

    `base` removes all tables, and with them all sessions.
    """
    from mcp_session_store.sql.schema import migrate

    async def go() -> str | None:
        await migrate.downgrade(url, schema=schema, revision=revision)
        return await migrate.current(url, schema=schema)

    found = run(go())
    click.echo("the schema is removed" if found is None else f"the schema is at {found}")


@click.command()
@url_option
@schema_option
def current(url: str, schema: str | None) -> None:
    """Print the revision of the database's schema, or `none`."""
    from mcp_session_store.sql.schema import migrate

    click.echo(run(migrate.current(url, schema=schema)) or "none")


@click.command()
@url_option
@schema_option
def check(url: str, schema: str | None) -> None:
    """Check that the database's schema fits this version of the package.

    Exit code 1, with the command to run, when it does not.
    """
    from mcp_session_store.sql.schema import migrate

    run(migrate.check(url, schema=schema))
    click.echo("the schema fits")
