"""Health over HTTP: whether the process serves, and whether it is ready; outside of the app's auth and guards."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from mcp_session_store.adapter.readiness import State
from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["add_health", "checked_health_path"]

LIVE: Final = "/live"
READY: Final = "/ready"
_METHODS: Final = ("GET", "HEAD")
_NO_STORE: Final = {"Cache-Control": "no-store"}

_SERVING: Final = (State.READY, State.DEGRADED)
"""States in which requests are to come. While the store is away they are, too, because it is for all instances at once,
and each serves what it has in memory, and lets other requests wait."""


def checked_health_path(path: object) -> str | None:
    """Return a path below which health is served, without a slash at its end; `None` for none.

    Raises:
        ConfigurationError: It cannot be such a path.
    """
    if path is None:
        return None
    if not isinstance(path, str) or not path.startswith("/") or set(path) & set("{}?#") or not path.isprintable():
        raise ConfigurationError(f"health_path={path!r} is no path; give one that begins with a slash, as in /health")
    return path.rstrip("/")


def add_health(app: Starlette, path: str, state: Callable[[], State]) -> None:
    """Serve health in an app that has not started, around all that it consists of.

    Args:
        app: The app.
        path: Path that `checked_health_path` returned.
        state: Returns the state of readiness.
    """
    app.add_middleware(_Health, of=app, path=path, state=state)


class _Health:
    """Middleware that answers requests for `…/live` and `…/ready`, where the application has no route of its own.

    Args:
        app: The rest of the application.
        of: The application.
        path: Path below which health is served.
        state: Returns the state of readiness.
    """

    def __init__(self, app: ASGIApp, *, of: Starlette, path: str, state: Callable[[], State]) -> None:
        self._app = app
        self._of = of
        self._state = state
        # Routes, because they know about mounts and root paths. They serve nothing: their app would have the guards.
        self._live, self._ready = (Route(f"{path}{end}", _serves_nothing) for end in (LIVE, READY))
        self._segments = self._live.path.count("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith((LIVE, READY)):
            for route in (self._live, self._ready):
                if route.matches(scope)[0] is not Match.NONE and not self._is_taken(scope):
                    await self._answer(scope, is_ready=route is self._ready)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_taken(self, scope: Scope) -> bool:
        """Return whether the application has a route for this path, and not only one for every path of its length."""
        anywhere = f"/{secrets.token_hex(8)}" * self._segments
        elsewhere = {**scope, "path": f"{scope.get('root_path', '')}{anywhere}"}
        return any(
            route.matches(scope)[0] is not Match.NONE and route.matches(elsewhere)[0] is Match.NONE
            for route in self._of.routes
        )

    def _answer(self, scope: Scope, *, is_ready: bool) -> Response:
        if scope["method"] not in _METHODS:
            return Response(status_code=405, headers=_NO_STORE | {"Allow": ", ".join(_METHODS)})
        text, status = "live", 200
        if is_ready:
            state = self._state()
            strict = QueryParams(scope["query_string"]).get("strict", "false") not in ("false", "0")
            text, status = state.value, 200 if state in (_SERVING[:1] if strict else _SERVING) else 503
        answer = JSONResponse({"status": text}, status_code=status, headers=_NO_STORE)
        if scope["method"] == "HEAD":
            # The header keeps the length that a GET has.
            answer.body = b""
        return answer


def _serves_nothing() -> None: ...
