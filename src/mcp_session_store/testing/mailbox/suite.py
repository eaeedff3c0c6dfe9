"""Fixtures, methods to override and steps that all parts of the suite for mailboxes use."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from mcp_session_store.mailbox import MESSAGE_PAGE, MailboxSweepReport
from mcp_session_store.store import DEFAULT_NAMESPACE
from mcp_session_store.testing.factories import new_presence, new_session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.mailbox import Mailbox, Message, NewMessage
    from mcp_session_store.store import SessionStore


class MakeMailbox(Protocol):
    """Function that makes a mailbox, and the store of the sessions beside it, for a namespace.

    All mailboxes and stores that one function makes share their data.
    """

    def __call__(self, namespace: str = DEFAULT_NAMESPACE) -> tuple[SessionStore, Mailbox]: ...


async def run_instances(mailbox: Mailbox, *numbers: int | None) -> list[str]:
    """Have an instance run for each number, and return their ids."""
    presences = [new_presence(number) for number in numbers]
    for presence in presences:
        assert await mailbox.beat(presence)
    return [presence.instance for presence in presences]


async def read_all(
    mailbox: Mailbox, recipient: int, delivered: dict[int, int] | None = None, *, limit: int = MESSAGE_PAGE
) -> list[Message]:
    """Read what waits for an instance page by page, as the instance does, and note it in `delivered`."""
    delivered = {} if delivered is None else delivered
    messages: list[Message] = []
    more = True
    while more:
        page = await mailbox.receive(recipient, delivered=delivered, limit=limit)
        assert len(page.messages) <= limit
        assert page.messages or not page.more
        for message in page.messages:
            assert message.sequence > delivered.get(message.sender, -1)
            delivered[message.sender] = message.sequence
        messages += page.messages
        more = page.more
    return messages


async def peek(mailbox: Mailbox, recipient: int) -> list[tuple[int, int]]:
    """Return the senders and sequences of the first page for an instance, which stays unread."""
    page = await mailbox.receive(recipient, delivered={})
    return places(page.messages)


def places(messages: Iterable[Message | NewMessage]) -> list[tuple[int, int]]:
    """Return senders and sequences of messages."""
    return [(message.sender, message.sequence) for message in messages]


async def sweep_messages(mailbox: Mailbox, *, limit: int = 500) -> MailboxSweepReport:
    """Sweep until there is no more to do, and return what was removed in all."""
    report, instances = MailboxSweepReport(more=True), 0
    gone, unread, untaken = Counter[str](), Counter[str](), Counter[str]()
    for _ in range(200):
        if not report.more:
            return MailboxSweepReport(instances=instances, gone=gone, unread=unread, untaken=untaken)
        report = await mailbox.sweep(limit=limit)
        instances += report.instances
        gone.update(report.gone)
        unread.update(report.unread)
        untaken.update(report.untaken)
    raise AssertionError("a sweep has no end")


@pytest.mark.anyio
class MailboxSuite:
    """The mailbox under test, and the store of the sessions beside it."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Name of the event loop. Override it for a mailbox that needs another than asyncio."""
        return "asyncio"

    @pytest.fixture
    def make_mailbox(self) -> MakeMailbox:
        """Function that makes mailboxes over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_mailbox")

    @pytest.fixture
    def made(self, make_mailbox: MakeMailbox) -> tuple[SessionStore, Mailbox]:
        return make_mailbox()

    @pytest.fixture
    def store(self, made: tuple[SessionStore, Mailbox]) -> SessionStore:
        return made[0]

    @pytest.fixture
    def mailbox(self, made: tuple[SessionStore, Mailbox]) -> Mailbox:
        return made[1]

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Set the expiry of a session of the store to one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_instance(self, mailbox: Mailbox, instance: str, by: timedelta) -> None:
        """Set the last heartbeat of an instance to that long before it was."""
        raise NotImplementedError("override the method age_instance")

    async def age_messages(self, mailbox: Mailbox, by: timedelta) -> None:
        """Set the times of all messages and stream messages to that long before they were."""
        raise NotImplementedError("override the method age_messages")

    async def _opened(self, store: SessionStore, **changes: Any) -> UUID:
        return (await store.create(new_session(**changes))).key
