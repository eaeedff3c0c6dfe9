"""Channels of notifications, and the part of the listening connection that a store, a log or a mailbox has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_session_store.sql.dialects.channel import NotificationChannel
from mcp_session_store.sql.listening import Subscription

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from uuid import UUID

    from mcp_session_store.sql.listening import Listening

__all__ = ["EVENT_CHANNEL", "MAIL_CHANNELS", "SESSION_CHANNEL", "Listener"]

SESSION_CHANNEL: Final = NotificationChannel("mcp_session_change")
"""Channel for the ends of sessions and for their new revisions."""
EVENT_CHANNEL: Final = NotificationChannel("mcp_session_event")
"""Channel for the new events of sessions."""
MAIL_CHANNELS: Final = "mcp_session_mail_"
"""Name of the channels for new messages, each of which ends with the number of its only listener."""


class Listener:
    """Listens for one store, event log or mailbox, on the connection that those of one database share."""

    def __init__(self, listening: Listening) -> None:
        self._listening = listening
        self._subscriptions: set[Subscription] = set()

    @property
    def hears(self) -> bool:
        """Whether notifications arrive now."""
        return any(subscription.hears for subscription in self._subscriptions)

    def holds(self, name: str) -> bool:
        """Return whether the lock of an instance is held, by the unique part of its id."""
        return any(subscription.held and subscription.name == name for subscription in self._subscriptions)

    async def listen(
        self,
        channel: NotificationChannel,
        on_hint: Callable[[Collection[UUID] | None], None],
        *,
        name: str | None = None,
        on_held: Callable[[], None] | None = None,
    ) -> None:
        """Pass on the notifications of a channel as hints, and hold the lock of an instance, until cancelled.

        Args:
            channel: Channel to listen to.
            on_hint: See `Mailbox.listen`.
            name: Unique part of the instance's id.
            on_held: See `Mailbox.listen`.
        """
        loop = self._listening.database.bind()
        subscription = Subscription(channel, on_hint, name, on_held, loop.create_future())
        self._subscriptions.add(subscription)
        self._listening.subscribe(subscription)
        try:
            error = await subscription.ended
        finally:
            self._subscriptions.discard(subscription)
            self._listening.unsubscribe(subscription)
        raise error

    async def aclose(self) -> None:
        """End all calls of `listen`."""
        await self._listening.end(self._subscriptions)
