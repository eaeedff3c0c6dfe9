"""The official Python client of `mcp<2` in one session: a call for each line of its input, a line for each outcome."""

import asyncio
import sys

from mcp import ClientSession, McpError
from mcp.client.streamable_http import streamablehttp_client


async def main(url: str) -> None:
    async with (
        streamablehttp_client(url) as (read, write, session_id),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        print("session", session_id(), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            try:
                result = await session.call_tool("whoami", {})
                print("error" if result.isError else "result", flush=True)
            except McpError as error:
                print("error", error.error.code, error.error.message, flush=True)


asyncio.run(main(sys.argv[1]))
