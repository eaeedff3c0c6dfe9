"""`python -m mcp_session_store.cli`, where the command itself is not on the path."""

from mcp_session_store.cli import main

main(prog_name="mcp-session-store")
