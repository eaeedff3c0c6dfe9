"""Alembic's environment: finds the database, for the `alembic` command and for the package's own commands."""

from __future__ import annotations

import os
from logging.config import fileConfig

from alembic import context
from alembic.util.exc import CommandError

from mcp_session_store.errors import SessionStoreError
from mcp_session_store.sql.schema.migrate import run_offline, run_online

config = context.config
given = config.attributes  # set by `mcp_session_store.sql.schema.migrate`
asked = context.get_x_argument(as_dictionary=True)

if config.cmd_opts is not None and config.config_file_name is not None:
    # Under the `alembic` command only, because a program that migrates has its own logging.
    fileConfig(config.config_file_name, disable_existing_loggers=False)

schema = given["schema"] if "schema" in given else asked.get("schema", os.environ.get("MCP_SESSION_STORE_SCHEMA"))
url = given.get("url") or asked.get("url") or os.environ.get("MCP_SESSION_STORE_URL")
connection = given.get("connection")

if url is None and connection is None:
    raise CommandError(
        "no database is named; set MCP_SESSION_STORE_URL, or run: alembic -x url=postgresql://… upgrade head"
    )

try:
    if context.is_offline_mode():
        run_offline(context, url, schema=schema)
    else:
        run_online(context, connection if connection is not None else url, schema=schema)
except SessionStoreError as error:
    if config.cmd_opts is None:
        raise
    raise CommandError(str(error)) from error
