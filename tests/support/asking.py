"""A server that asks its clients, for tests of what they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mcp_types as types
from mcp.shared.message import ServerMessageMetadata

from tests.support.instances import Notes

if TYPE_CHECKING:
    from tests.support.asgi import Client, Exchange
    from tests.support.instances import Instance, RequestContext


class Asking(Notes):
    """A server with tools that ask the client for its roots and tell their URIs.

    `ask` asks without a token for progress, `ask_for_progress` with one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tools["ask"] = self._ask
        self.tools["ask_for_progress"] = self._ask_for_progress
        self.heard: list[str] = []
        """Progress and answers, in their order."""
        self.roots_changed = 0
        """Number of times that the handler of `notifications/roots/list_changed` ran."""
        self.server.add_notification_handler(
            "notifications/roots/list_changed", types.NotificationParams, self._handle_roots_changed
        )

    async def _ask(self, ctx: RequestContext) -> str:
        return await self._asked(ctx)

    async def _ask_for_progress(self, ctx: RequestContext) -> str:
        async def progressed(progress: float, total: float | None, message: str | None) -> None:
            self.heard.append(f"{progress:g}")

        return await self._asked(ctx, progress_callback=progressed)

    async def _asked(self, ctx: RequestContext, **options: Any) -> str:
        answer = await ctx.session.send_request(
            types.ListRootsRequest(),
            types.ListRootsResult,
            metadata=ServerMessageMetadata(related_request_id=ctx.request_id),
            **options,
        )
        text = " ".join(str(root.uri) for root in answer.roots)
        self.heard.append(text)
        return text

    async def _handle_roots_changed(self, _ctx: RequestContext, _params: types.NotificationParams) -> None:
        self.roots_changed += 1


async def asked(
    one: Instance, other: Instance, tool: str = "ask", *, resident: bool = False
) -> tuple[Client, Exchange, dict[str, Any]]:
    """Have one instance ask a client within a call, and return the client on another one, the call, and the question.

    Args:
        one: Instance with an `Asking` server, which opens the session.
        other: Another instance on the same sessions.
        tool: Tool that asks.
        resident: Whether the session is in the memory of the other instance, too.
    """
    client = one.client()
    elsewhere = other.client(await client.begin())
    if resident:
        assert (await elsewhere.ping()).status == 200
    call = client.open_call(tool)
    return elsewhere, call, await call.next()


def roots(name: str) -> dict[str, Any]:
    """Return the result of a question for roots."""
    return {"roots": [{"uri": f"file:///{name}"}]}


def text_of(answer: dict[str, Any]) -> str:
    """Return the text that a tool gave."""
    text: str = answer["result"]["content"][0]["text"]
    return text
