"""A server whose sessions have state that the handshake does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mcp_types as types

from mcp_session_store import get_restore_marker
from tests.support.instances import Notes

if TYPE_CHECKING:
    from tests.support.asgi import Client
    from tests.support.instances import RequestContext


class NoteParams(types.RequestParams):
    note: Any = None
    theme: Any = None


class Stateful(Notes):
    """Notes whose sessions have state that the handshake does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.handled: list[tuple[str, Any, bool]] = []
        """Method, what it is about, and whether it was replayed, in the order of the handlers' ends."""
        self.began: list[str] = []
        self.on_state: Any = None
        """What a handler does besides."""
        for method in ("notes/pin", "notes/unpin", "notes/theme"):
            self.server.add_request_handler(method, NoteParams, self._handle)
        self.server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, self._handle)
        self.server.add_request_handler("resources/subscribe", types.SubscribeRequestParams, self._handle)
        self.server.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, self._handle)

    async def _handle(self, ctx: RequestContext, params: Any) -> types.EmptyResult:
        marker = get_restore_marker(ctx)
        self.began.append(ctx.method)
        if self.on_state is not None:
            await self.on_state(ctx)
        about = next(
            str(value)
            for name in ("level", "uri", "note", "theme")
            if (value := getattr(params, name, None)) is not None
        )
        self.handled.append((ctx.method, about, marker is not None and marker.replaying))
        return types.EmptyResult()

    @property
    def set_again(self) -> list[tuple[str, str]]:
        """What replayed calls have set, in order."""
        return [(method, about) for method, about, replayed in self.handled if replayed]


async def set_level(client: Client, level: str) -> None:
    answer = await client.request("logging/setLevel", {"level": level})
    assert answer.result == {}, answer


async def subscribe(client: Client, uri: str, *, un: bool = False) -> None:
    answer = await client.request("resources/unsubscribe" if un else "resources/subscribe", {"uri": uri})
    assert answer.result == {}, answer
