"""A server whose calls say on their streams what the test makes them say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types

from tests.support.asgi import PATIENCE, until
from tests.support.instances import Notes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.asgi import Client, Exchange
    from tests.support.http import Message
    from tests.support.instances import RequestContext


class Call:
    """A running call of the tool `talk`."""

    def __init__(self, ctx: RequestContext) -> None:
        self.ctx = ctx
        self.cancelled = False
        self._answered = anyio.Event()
        self._text = ""

    async def say(self, *texts: str) -> None:
        """Send notifications on the call's stream."""
        for text in texts:
            await self.ctx.session.send_notification(_notification(text), related_request_id=self.ctx.request_id)

    async def tell(self, *texts: str) -> None:
        """Send notifications on the standalone stream."""
        for text in texts:
            await self.ctx.session.send_notification(_notification(text))

    async def close(self) -> None:
        """Close the call's stream, so that the client comes back for it."""
        assert self.ctx.close_sse_stream is not None
        await self.ctx.close_sse_stream()

    async def close_standalone(self) -> None:
        """Close the standalone stream, so that the client comes back for it."""
        assert self.ctx.close_standalone_sse_stream is not None
        await self.ctx.close_standalone_sse_stream()

    def answer(self, text: str = "done") -> None:
        """Return from the call."""
        self._text = text
        self._answered.set()

    async def run(self) -> str:
        """Run the tool: wait for the answer."""
        try:
            await self._answered.wait()
        except BaseException:
            self.cancelled = True
            raise
        return self._text


class Talking:
    """A server with the tool `talk`, whose calls the test controls; one for each instance."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.notes.tools["talk"] = self._talk
        self.calls: list[Call] = []
        """All calls that have ever begun."""
        self._taken = 0

    async def _talk(self, ctx: RequestContext) -> str:
        call = Call(ctx)
        self.calls.append(call)
        return await call.run()

    async def begun(self) -> Call:
        """Wait for the next call to begin."""
        await until(lambda: len(self.calls) > self._taken)
        self._taken += 1
        return self.calls[self._taken - 1]

    async def call(self, client: Client, *, request_id: str | int | None = None) -> tuple[Call, Exchange]:
        """Have a client call the tool; return the running call, and the client's end of it."""
        exchange = client.open_call("talk", request_id=request_id)
        with anyio.fail_after(PATIENCE):
            return await self.begun(), exchange


def _notification(text: str) -> types.ServerNotification:
    return types.LoggingMessageNotification(params=types.LoggingMessageNotificationParams(level="info", data=text))


def told(messages: Sequence[Message]) -> list[Any]:
    """Return the text of each message: of a notification, of a result, the reason of an error."""
    return [_told(message) for message in messages]


def _told(message: Message) -> Any:
    if "method" in message:
        return message["params"]["data"]
    if "error" in message:
        return (message["error"].get("data") or {}).get("reason", message["error"]["message"])
    return message["result"]["content"][0]["text"]


async def hears(exchange: Exchange, *texts: str) -> None:
    """Wait until a stream has these texts, and check that it has no others."""
    await exchange.start()
    with anyio.move_on_after(PATIENCE):
        while len(exchange.messages) < len(texts):
            await anyio.sleep(0.002)
    assert told(exchange.messages) == list(texts), exchange.body
