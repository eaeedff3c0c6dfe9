"""Entry to the SDK's server loop, for new sessions and for those that are replayed first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from mcp.server.runner import aclose_shielded

from mcp_session_store.adapter import sdk

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from mcp_session_store.adapter.replay.replay import Replay
    from mcp_session_store.adapter.sdk import ManagerSeams, MessageReadStream, MessageWriteStream

__all__ = ["serve"]


def serve(
    manager: ManagerSeams, read: MessageReadStream, write: MessageWriteStream, session_id: str, replay: Replay | None
) -> Awaitable[None]:
    """Serve a session over a pair of streams, until the stream that is read ends.

    Args:
        manager: Manager whose server it is.
        read: Messages of the client's.
        write: Messages to the client.
        session_id: Id of the session.
        replay: What is replayed before the client's messages are read; `None` for a new session.
    """
    if replay is None:
        return sdk.serve_loop(manager, read, write, session_id)
    return _serve_restored(manager, read, write, session_id, replay)


async def _serve_restored(
    manager: ManagerSeams, read: MessageReadStream, write: MessageWriteStream, session_id: str, replay: Replay
) -> None:
    dispatcher, runner = sdk.make_kernel(manager, read, write, session_id)
    try:
        async with anyio.create_task_group() as handlers:
            replayed = await replay.initialize(runner, handlers)
            # Not needed any more when it is over, while the loop runs on.
            del replay
            if replayed:
                await dispatcher.run(runner.on_request, runner.on_notify)
            # Late handlers end before what they use is cleaned up.
            handlers.cancel_scope.cancel()
    finally:
        await aclose_shielded(runner.connection)
