"""An `initialize` of the client's, as opposed to a replayed one: its outcome, and what is stored of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS
from pydantic import BaseModel

from mcp_session_store.adapter.latch import Latch
from mcp_session_store.records import display_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcp.server.context import HandlerResult
    from mcp_types import RequestId

    from mcp_session_store.adapter.responses import Answer

__all__ = [
    "HANDSHAKE",
    "Handshake",
    "HandshakeOutcome",
    "InitializeParams",
    "negotiated_version",
]


_as_json: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
"""Made once, because `json.dumps` makes an encoder for each call."""

HANDSHAKE: Final = "mcp_session_store.handshake"
"""Key of a request's ASGI scope under which the handshake stands that its HTTP answer waits for."""


class HandshakeOutcome(Enum):
    """What became of a handshake that no error of ours ended."""

    STORED = auto()
    """The record is committed: the client may learn its session id."""
    NOT_OPENED = auto()
    """It was answered with an error, or was no handshake: the answer goes out as it is."""


class Handshake:
    """One `initialize` on its way through the server."""

    __slots__ = ("_decided", "outcome", "recorded", "request_id")

    def __init__(self) -> None:
        self.request_id: RequestId | None = None
        self.recorded = False
        """The record is committed."""
        self.outcome: HandshakeOutcome | Answer | None = None
        """The outcome once it is decided; an `Answer` is what the client gets instead of the server's answer."""
        self._decided = Latch()

    def settle(self, outcome: HandshakeOutcome | Answer) -> None:
        """Decide the outcome, once."""
        if self.outcome is None:
            self.outcome = outcome
            self._decided.set()

    async def wait(self) -> HandshakeOutcome | Answer:
        """Wait until the outcome is decided, and return it."""
        await self._decided.wait()
        assert self.outcome is not None
        return self.outcome


@dataclass(frozen=True, slots=True)
class InitializeParams:
    """Params of an `initialize`, in the form in which they are stored."""

    text: str
    client_name: str
    client_version: str

    @classmethod
    def encode(cls, params: Mapping[str, Any] | None, *, limit: int) -> InitializeParams:
        """Encode raw params as JSON text.

        Args:
            params: As the client sent them, unknown fields included.
            limit: Highest number of bytes that are stored.

        Raises:
            MCPError: INVALID_PARAMS; the message says which value cannot be stored.
        """
        try:
            # ASCII, so that `\u0000` and lone surrogates stay escapes, which any database keeps.
            text = _as_json(params)
        except (ValueError, RecursionError):
            raise MCPError(
                code=INVALID_PARAMS,
                message="The params of initialize hold a number that is not finite or too long, or are nested too "
                "deeply, and cannot be stored; send finite numbers in flat structures",
            ) from None
        if len(text) > limit:
            raise MCPError(
                code=INVALID_PARAMS,
                message=f"The params of initialize have {len(text)} bytes as JSON, and this server stores at most "
                f"{limit}; declare less in capabilities, clientInfo and _meta",
            )
        client = (params or {}).get("clientInfo")
        info: Mapping[str, Any] = client if isinstance(client, dict) else {}
        return cls(
            text=text,
            client_name=display_text(info.get("name")),
            client_version=display_text(info.get("version")),
        )


def negotiated_version(result: HandlerResult) -> str:
    """Return the protocol version of an `initialize` result, in whichever form the middleware chain returns it."""
    if isinstance(result, BaseModel):
        result = result.model_dump(by_alias=True, mode="json")
    version = (result or {}).get("protocolVersion")
    return version if isinstance(version, str) else ""
