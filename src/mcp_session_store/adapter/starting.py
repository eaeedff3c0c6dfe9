"""A start that cannot succeed fails with one line that says what to do, under any server."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, cast

import anyio

from mcp_session_store.adapter.endpoint import mcp_endpoint
from mcp_session_store.adapter.readiness import FINAL, VERDICT_WITHIN, not_answered
from mcp_session_store.errors import StoreBusy, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.applications import Starlette
    from starlette.types import Message, Receive, Scope, Send

    from mcp_session_store.adapter.manager import DurableSessionManager

__all__ = ["ask_store", "final_cause", "run_in_lifespan", "say_in_one_line"]

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def run_in_lifespan(manager: DurableSessionManager) -> AsyncIterator[None]:
    """Run a manager within the lifespan of an app.

    Raises:
        StoreMisconfigured, SchemaError, ConfigurationError: The start cannot succeed. No cause is chained, because
            servers print all of them, and the message says what is to be done.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(manager.run())
        except FINAL as error:
            logger.debug("the start fails", exc_info=True)
            manager.readiness.cause = error
            raise error.with_traceback(None) from None
        yield


def say_in_one_line(app: Starlette) -> None:
    """Have an app whose start cannot succeed tell its server so in one line, instead of a traceback."""
    own = app.router.lifespan

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            # Starlette sends from where it handles the error.
            if message["type"] == "lifespan.startup.failed" and isinstance(error := sys.exception(), FINAL):
                message = {**message, "message": f"the server cannot start: {error}"}
            await send(message)

        await own(scope, receive, sending)

    # Not by a middleware, which each request would pass.
    setattr(app.router, "lifespan", lifespan)  # noqa: B010 - a method


async def ask_store(app: Starlette) -> None:
    """Ask the store of an app whether it can be used, before the app starts, which then does not ask again.

    Raises:
        StoreMisconfigured, SchemaError, ConfigurationError: The start cannot succeed.
    """
    manager = _manager_of(app)
    stores = [manager.store] if manager.event_log is None else [manager.store, manager.event_log]
    try:
        with anyio.move_on_after(VERDICT_WITHIN) as scope:
            for store in stores:
                await store.open()
        if scope.cancelled_caught:
            raise not_answered()
    except (StoreUnavailable, StoreBusy) as error:
        manager.readiness.verdict = error
    finally:
        # The app uses them in an event loop of its own.
        for store in reversed(stores):
            await store.aclose()


def final_cause(app: Starlette) -> Exception | None:
    """Return the final cause for which the store of an app cannot be used; `None` where there is none."""
    cause = _manager_of(app).readiness.cause
    return cause if isinstance(cause, FINAL) else None


def _manager_of(app: Starlette) -> DurableSessionManager:
    return cast("DurableSessionManager", mcp_endpoint(app).session_manager)
