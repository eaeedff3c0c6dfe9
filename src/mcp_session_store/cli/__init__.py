"""The command line, `mcp-session-store`: a module for each command, and modules for what they share."""

from __future__ import annotations

import click

from mcp_session_store.cli.copy import copy
from mcp_session_store.cli.doctor import doctor
from mcp_session_store.cli.events import events
from mcp_session_store.cli.instances import instances
from mcp_session_store.cli.migrations import check, current, downgrade, upgrade
from mcp_session_store.cli.namespaces import namespaces
from mcp_session_store.cli.options import Group
from mcp_session_store.cli.serve import serve, worker_app
from mcp_session_store.cli.sessions import sessions
from mcp_session_store.cli.sweep import sweep

__all__ = ["main", "worker_app"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mcp-session-store")
def main() -> None:
    """Durable sessions for MCP servers: migrate the database, serve a server object, look after the sessions.

    Exit codes: 0 done; 1 a check or an operation failed (schema, database, a session that is not there); 2 wrong
    usage (arguments, settings, the server object); 3 a server cannot start until its database, or how it is reached, is
    repaired.
    """


for command in (
    upgrade,
    downgrade,
    current,
    check,
    doctor,
    serve,
    sessions,
    events,
    namespaces,
    instances,
    sweep,
    copy,
):
    main.add_command(command)
