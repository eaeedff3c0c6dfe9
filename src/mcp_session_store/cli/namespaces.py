"""The command that lists the namespaces of a database."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from mcp_session_store.cli.options import json_option, run
from mcp_session_store.cli.output import Column, ago, number, print_json, print_table
from mcp_session_store.cli.target import tables_options

if TYPE_CHECKING:
    from mcp_session_store.cli.target import Target
    from mcp_session_store.sql.admin.namespaces import NamespaceList

__all__ = ["namespaces"]

_COLUMNS: Final = (
    Column(title="NAMESPACE", width=12, flexible=True),
    Column(title="LIVE", width=9, right=True),
    Column(title="EXPIRED", width=9, right=True, rank=2),
    Column(title="ENDED", width=9, right=True, rank=2),
    Column(title="LAST SEEN", width=10, rank=1),
)


@click.command(short_help="List the namespaces, with their numbers of sessions.")
@tables_options
@json_option
def namespaces(target: Target, *, as_json: bool) -> None:
    """List the namespaces that have stored sessions, with their numbers and the time of the last use.

    Expired sessions are not yet swept, and ended ones still kept. Reads all sessions, and blocks no server; give a
    large table a longer --timeout.
    """

    async def read() -> NamespaceList:
        async with target.namespaces() as directory:
            return await directory.all()

    found = run(read())
    if as_json:
        print_json({"as_of": found.as_of, "namespaces": [asdict(one) for one in found.namespaces]})
    elif found.namespaces:
        rows = [
            [
                one.namespace,
                number(one.live),
                number(one.expired),
                number(one.ended),
                "" if one.last_seen_at is None else ago(one.last_seen_at, found.as_of),
            ]
            for one in found.namespaces
        ]
        print_table(_COLUMNS, rows)
    else:
        click.echo("no namespace has sessions", err=True)
