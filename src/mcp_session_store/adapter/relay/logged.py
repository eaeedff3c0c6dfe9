"""Streams with an event log: what instances tell one another of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["LoggedStreams"]


class LoggedStreams:
    """Has the streams of an instance read the log when others have stored what is for them."""

    def hinted(self, session: ResidentSession) -> None: ...

    def entered(self, session: ResidentSession, *, waiting: bool) -> None:
        pass

    def handed_over(self, session: ResidentSession) -> None:
        pass

    async def hand_over(self, key: UUID, session: ResidentSession | None) -> int | None:  # noqa: ARG002
        return None
