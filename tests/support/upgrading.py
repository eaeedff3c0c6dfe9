"""A program that migrates the database of its first argument as soon as its input ends."""

import asyncio
import sys

from mcp_session_store.sql.schema import migrate

print("ready", flush=True)
sys.stdin.read()
asyncio.run(migrate.upgrade(sys.argv[1]))
