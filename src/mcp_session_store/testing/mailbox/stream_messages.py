"""Cases of the suite for mailboxes: messages for the streams of sessions."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.mailbox import HOLDER, SILENT_AFTER, MailboxSweepReport, MessageKind
from mcp_session_store.records import EndReason
from mcp_session_store.stream_mail import (
    MARK_LIFETIME,
    STREAM_MESSAGE_LIFETIME,
    STREAM_PAGE,
    STREAM_QUEUE,
    STREAM_QUEUE_BYTES,
    STREAM_WAIT,
    Said,
    StreamMessageKind,
    StreamPage,
    Withdrawal,
)
from mcp_session_store.testing.factories import new_message, new_stream_message
from mcp_session_store.testing.mailbox.suite import (
    MailboxSuite,
    MakeMailbox,
    peek,
    read_all,
    run_instances,
    sweep_messages,
)
from mcp_session_store.testing.refusals import UNSTORABLE_TEXTS, refused
from mcp_session_store.testing.sessions.streams import claim_stream

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.mailbox import Mailbox
    from mcp_session_store.store import SessionStore

SECOND = timedelta(seconds=1)
QUESTION = StreamMessageKind.QUESTION


def _places(page: StreamPage) -> list[tuple[int, int]]:
    return [(message.sender, message.sequence) for message in page.messages]


class StreamMessages(MailboxSuite):
    """Messages for the streams of sessions."""

    async def _streaming(self, store: SessionStore, mailbox: Mailbox, holder: int | None = 2) -> UUID:
        """Open a session whose stream an instance has, beside three others; return its key."""
        await run_instances(mailbox, *({1, 2, 3, 4} - {running.number for running in await mailbox.instances()}))
        key = await self._opened(store)
        if holder is not None:
            await claim_stream(store, key, holder)
        return key

    async def _say(self, mailbox: Mailbox, key: UUID, *sequences: int, sender: int = 1) -> Said:
        return await mailbox.say([new_stream_message(sequence, key=key, sender=sender) for sequence in sequences])

    async def _take(self, mailbox: Mailbox, key: UUID, given: dict[int, int], *, holder: int = 2) -> list[int]:
        """Take what waits as a holder does that gives all of it; return the sequences."""
        taken: list[int] = []
        more = True
        while more:
            page = await mailbox.take(key, holder, given=given)
            for message in page.messages:
                given[message.sender] = message.sequence
                taken.append(message.sequence)
            more = page.more
            assert page.messages or not more
        assert await mailbox.take(key, holder, given=given) == StreamPage()
        return taken

    @pytest.mark.parametrize("kind", StreamMessageKind)
    async def test_a_message_is_taken_as_it_was_said(self, make_mailbox: MakeMailbox, kind: StreamMessageKind) -> None:
        (store, here), (_, there) = make_mailbox(), make_mailbox()
        key = await self._streaming(store, here)
        new = new_stream_message(2**62, key=key, sender=1, kind=kind, body=json.dumps({"é": "\0\ud800"}) + "é")
        assert await here.say([new]) == Said()
        page = await there.take(key, 2, given={})
        [message] = page.messages
        assert not page.more
        assert not page.held_up
        assert (message.sender, message.sequence, message.kind, message.body) == (1, 2**62, kind, new.body)
        assert timedelta(0) <= message.age < timedelta(minutes=1)

    async def test_the_holder_gets_one_hint_for_each_session(self, store: SessionStore, mailbox: Mailbox) -> None:
        key, other = [await self._streaming(store, mailbox) for _ in range(2)]
        sequences = {key: [1, 2, 4], other: [3, 5]}
        messages = [new_stream_message(n, key=key, sender=1) for key, numbers in sequences.items() for n in numbers]
        messages.sort(key=lambda message: message.sequence)
        for _ in range(2):
            assert await mailbox.say(messages) == Said()
            hints = (await mailbox.receive(2, delivered={})).messages
            assert [(hint.kind, hint.key, hint.sequence, hint.body) for hint in hints] == [
                (MessageKind.STREAM, key, 4, ""),
                (MessageKind.STREAM, other, 5, ""),
            ]
        for number in (1, 3, 4):
            assert await peek(mailbox, number) == []

    async def test_what_no_other_running_instance_is_told_of_waits_unheard(
        self, store: SessionStore, mailbox: Mailbox
    ) -> None:
        without, own, stopped = [await self._streaming(store, mailbox, holder) for holder in (None, 1, 9)]
        [silent] = await run_instances(mailbox, 8)
        await claim_stream(store, of_silent := await self._opened(store), 8)
        await self.age_instance(mailbox, silent, SILENT_AFTER + 10 * SECOND)
        for number, key in enumerate([without, own, stopped, of_silent]):
            assert await self._say(mailbox, key, number) == Said(unheard={key})
        assert await peek(mailbox, 1) == await peek(mailbox, 8) == []
        await claim_stream(store, without, 2)
        assert await self._take(mailbox, without, {}) == [0]
        assert await self._take(mailbox, own, {}, holder=1) == [1]

    async def test_a_claim_says_whether_messages_wait(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox, None)
        await self._say(mailbox, await self._streaming(store, mailbox, None), 1)
        for waiting in (False, True):
            holder = await claim_stream(store, key, 2)
            assert holder is not None
            assert holder.waiting is waiting
            await self._say(mailbox, key, 2)
        await self._take(mailbox, key, {})
        holder = await claim_stream(store, key, 2)
        assert holder is not None
        assert not holder.waiting

    async def test_a_message_to_the_holder_is_read_by_it(self, store: SessionStore, mailbox: Mailbox) -> None:
        key, own, without, stopped = [await self._streaming(store, mailbox, holder) for holder in (2, 1, None, 9)]
        keys = [key, own, without, stopped, uuid.uuid4(), key]
        messages = [
            new_message(number, recipient=HOLDER, sender=1, key=key, kind=MessageKind.CLOSE_STREAM)
            for number, key in enumerate(keys)
        ]
        assert await mailbox.post([*messages, new_message(9, recipient=5, sender=1)]) == {5}
        assert await peek(mailbox, 2) == [(1, 0), (1, 5)]
        for number in (1, 3, 4):
            assert await peek(mailbox, number) == []
        await claim_stream(store, key, 3)
        assert await mailbox.post([new_message(10, recipient=HOLDER, sender=1, key=key)]) == set()
        assert await peek(mailbox, 3) == [(1, 10)]

    async def test_messages_of_several_senders_come_in_the_order_of_each(
        self, store: SessionStore, mailbox: Mailbox
    ) -> None:
        key = await self._streaming(store, mailbox)
        other = await self._streaming(store, mailbox)
        for sequences, sender in (([5], 3), ([1, 2], 1), ([6, 7], 3), ([3], 1)):
            await self._say(mailbox, key, *sequences, sender=sender)
            await self._say(mailbox, other, *sequences, sender=sender)
            # Between senders times decide, and a store's clock may tell whole milliseconds only.
            await asyncio.sleep(0.002)
        page = await mailbox.take(key, 2, given={})
        assert _places(page) == [(3, 5), (1, 1), (1, 2), (3, 6), (3, 7), (1, 3)]
        # Of what is given, the rest comes again.
        page = await mailbox.take(key, 2, given={3: 5, 1: 1})
        assert _places(page) == [(1, 2), (3, 6), (3, 7), (1, 3)]
        assert await mailbox.take(key, 2, given={3: 7, 1: 3}) == StreamPage()

    async def test_a_take_that_is_repeated_returns_the_same(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        await self._say(mailbox, key, 1, 2, 3)
        for _ in range(2):
            assert _places(await mailbox.take(key, 2, given={})) == [(1, 1), (1, 2), (1, 3)]
        for _ in range(2):
            assert _places(await mailbox.take(key, 2, given={1: 2})) == [(1, 3)]
        await self._say(mailbox, key, 4)
        assert _places(await mailbox.take(key, 2, given={1: 2})) == [(1, 3), (1, 4)]

    async def test_what_was_given_is_not_taken_again_though_it_is_said_again(
        self, store: SessionStore, mailbox: Mailbox
    ) -> None:
        key = await self._streaming(store, mailbox)
        messages = [new_stream_message(number, key=key, sender=1) for number in range(1, 6)]
        await mailbox.say(messages[:4])
        assert _places(await mailbox.take(key, 2, given={})) == [(1, 1), (1, 2), (1, 3), (1, 4)]
        await mailbox.take(key, 2, given={1: 3})
        await claim_stream(store, key, 3)
        await mailbox.release(key, 2, given={1: 3})
        assert await mailbox.say(messages) == Said()
        assert await self._take(mailbox, key, {}, holder=3) == [4, 5]
        await mailbox.say(messages)
        await claim_stream(store, key, 4)
        assert await self._take(mailbox, key, {}, holder=4) == []

    async def test_an_instance_without_the_stream_takes_nothing(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        await self._say(mailbox, key, 1, 2)
        assert await mailbox.take(key, 3, given={}) == StreamPage(lost=True)
        await self._take(mailbox, key, {})
        await self._say(mailbox, key, 3)
        await claim_stream(store, key, 3)
        assert await mailbox.take(key, 2, given={1: 2}) == StreamPage(lost=True)
        assert await self._take(mailbox, key, {}, holder=3) == [3]

    async def test_what_was_taken_waits_for_its_release(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        await self._say(mailbox, key, 1, 2, 3)
        await mailbox.take(key, 2, given={})
        await claim_stream(store, key, 3)
        await self._say(mailbox, key, 4)
        await self._say(mailbox, key, 5, sender=4)
        page = await mailbox.take(key, 3, given={})
        # The messages of another sender are not behind those.
        assert (_places(page), page.held_up, page.more) == ([(4, 5)], True, False)
        for _ in range(2):
            await mailbox.release(key, 2, given={1: 1})
        page = await mailbox.take(key, 3, given={4: 5})
        assert (_places(page), page.held_up) == ([(1, 2), (1, 3), (1, 4)], False)

    async def test_what_a_lost_holder_has_taken_is_given_up(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        await mailbox.say(
            [
                new_stream_message(1, key=key, sender=1),
                new_stream_message(2, key=key, sender=1, kind=QUESTION),
                new_stream_message(3, key=key, sender=1),
            ]
        )
        await mailbox.take(key, 2, given={})
        await mailbox.take(key, 2, given={1: 1})
        await claim_stream(store, key, 3)
        await self._say(mailbox, key, 4)
        assert (await mailbox.take(key, 3, given={})).held_up
        page = await mailbox.take(key, 3, given={}, without_others=True)
        assert (_places(page), page.held_up) == ([(1, 4)], False)
        assert page.dropped == {StreamMessageKind.NOTIFICATION: 1, QUESTION: 1}
        # It comes back.
        assert await mailbox.take(key, 2, given={1: 3}) == StreamPage(lost=True)
        await mailbox.release(key, 2, given={1: 2})
        assert _places(await mailbox.take(key, 3, given={})) == [(1, 4)]
        assert await mailbox.withdraw(key, 1, 2) is Withdrawal.WITHDRAWN

    async def test_a_page_has_no_more_than_its_bound(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        await self._say(mailbox, key, *range(STREAM_QUEUE))
        questions = range(STREAM_QUEUE, STREAM_QUEUE + 10)
        await mailbox.say([new_stream_message(number, key=key, sender=1, kind=QUESTION) for number in questions])
        page = await mailbox.take(key, 2, given={})
        assert (len(page.messages), page.more) == (STREAM_PAGE, True)
        assert await self._take(mailbox, key, {}) == list(range(STREAM_QUEUE + 10))

    async def test_a_page_has_few_large_messages(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        body = json.dumps("x" * 600_000)
        for number, kind in enumerate(StreamMessageKind):
            await mailbox.say([new_stream_message(number, key=key, sender=1, kind=kind, body=body)])
        page = await mailbox.take(key, 2, given={})
        assert (_places(page), page.more) == ([(1, 0)], True)
        assert await self._take(mailbox, key, {}) == [0, 1]

    async def test_too_many_of_one_session_are_dropped(self, store: SessionStore, mailbox: Mailbox) -> None:
        key, other = await self._streaming(store, mailbox, None), await self._streaming(store, mailbox, None)
        await self._say(mailbox, key, *range(STREAM_QUEUE - 1))
        again = [new_stream_message(number, key=key, sender=1) for number in range(STREAM_QUEUE - 1, STREAM_QUEUE + 2)]
        beyond = {STREAM_QUEUE, STREAM_QUEUE + 1}
        assert await mailbox.say(again) == Said(dropped=beyond, unheard={key})
        # What is said again takes no room.
        assert (await mailbox.say(again)).dropped == beyond
        assert (await self._say(mailbox, key, 500, sender=3)).dropped == {500}
        assert (await self._say(mailbox, other, 501)).dropped == set()
        question = new_stream_message(502, key=key, sender=1, kind=QUESTION)
        assert (await mailbox.say([question])).dropped == set()
        await claim_stream(store, key, 2)
        given: dict[int, int] = {}
        assert await self._take(mailbox, key, given) == [*range(STREAM_QUEUE), 502]
        assert (await self._say(mailbox, key, 503)).dropped == set()

    async def test_too_large_ones_of_one_session_are_dropped(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox, None)
        for number, size in enumerate((STREAM_QUEUE_BYTES // 2, STREAM_QUEUE_BYTES // 2 - 1000, 2000, 500)):
            body = json.dumps("é" * (size // 2), ensure_ascii=False)
            message = new_stream_message(number, key=key, sender=1, body=body)
            assert (await mailbox.say([message])).dropped == ({2} if number == 2 else set())
        alone = new_stream_message(9, key=key, sender=1, kind=QUESTION, body=json.dumps("x" * 2 * STREAM_QUEUE_BYTES))
        assert (await mailbox.say([alone])).dropped == set()
        await claim_stream(store, key, 2)
        assert await self._take(mailbox, key, {}) == [0, 1, 3, 9]

    async def test_what_waits_for_too_long_is_not_taken(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox, None)
        await self._say(mailbox, key, *range(STREAM_QUEUE))
        await self.age_messages(mailbox, STREAM_WAIT + SECOND)
        assert (await self._say(mailbox, key, STREAM_QUEUE)).dropped == set()
        holder = await claim_stream(store, key, 2)
        assert holder is not None
        assert holder.waiting
        assert await self._take(mailbox, key, {}) == [STREAM_QUEUE]

    async def test_a_message_that_is_withdrawn_is_not_taken(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._streaming(store, mailbox)
        await self._say(mailbox, key, 1, 2, 3, 4)
        for _ in range(2):
            assert await mailbox.withdraw(key, 1, 2) is Withdrawal.WITHDRAWN
        await self._say(mailbox, key, 1, 2, 3, 4)
        given: dict[int, int] = {}
        assert await self._take(mailbox, key, given) == [1, 3, 4]
        for sequence in (1, 3, 4):
            assert await mailbox.withdraw(key, 1, sequence) is Withdrawal.GIVEN
        assert await mailbox.withdraw(key, 1, 2) is Withdrawal.WITHDRAWN
        for key_, sender, sequence in ((key, 1, 5), (key, 3, 1), (uuid.uuid4(), 1, 1)):
            assert await mailbox.withdraw(key_, sender, sequence) is Withdrawal.WITHDRAWN

    async def test_a_message_that_was_taken_is_withdrawn_after_its_release(
        self, store: SessionStore, mailbox: Mailbox
    ) -> None:
        key = await self._streaming(store, mailbox)
        await self._say(mailbox, key, 1, 2)
        await mailbox.take(key, 2, given={})
        for _ in range(2):
            assert await mailbox.withdraw(key, 1, 2) is Withdrawal.TAKEN
        await mailbox.release(key, 2, given={1: 1})
        assert await mailbox.withdraw(key, 1, 2) is Withdrawal.WITHDRAWN
        assert await mailbox.withdraw(key, 1, 1) is Withdrawal.GIVEN

    @pytest.mark.parametrize("reason", EndReason)
    async def test_a_session_that_ends_loses_what_waits_for_its_stream(
        self, store: SessionStore, mailbox: Mailbox, reason: EndReason
    ) -> None:
        key, other = await self._streaming(store, mailbox), await self._streaming(store, mailbox)
        for number, one in enumerate((key, other)):
            await self._say(mailbox, one, number)
        assert await store.end(key, reason=reason)
        assert await mailbox.take(key, 2, given={}) == StreamPage(lost=True)
        assert (await self._say(mailbox, key, 5)).dropped == {5}
        assert (await self._say(mailbox, uuid.uuid4(), 6)).dropped == {6}
        assert await self._take(mailbox, other, {}) == [1]
        await self.age_messages(mailbox, 2 * MARK_LIFETIME)
        assert (await sweep_messages(mailbox)).untaken == {}

    async def test_a_sweep_removes_what_no_stream_took(self, store: SessionStore, mailbox: Mailbox) -> None:
        key, given = await self._streaming(store, mailbox), dict[int, int]()
        await self._say(mailbox, key, 1, 2)
        await self._take(mailbox, key, given)
        await read_all(mailbox, 2, {1: 2})
        await self.age_messages(mailbox, MARK_LIFETIME - STREAM_MESSAGE_LIFETIME - 5 * SECOND)
        await mailbox.say(
            [
                *(new_stream_message(number, key=key, sender=1) for number in range(3, 10)),
                new_stream_message(10, key=key, sender=1, kind=QUESTION),
            ]
        )
        assert (await sweep_messages(mailbox)).untaken == {}
        await self.age_messages(mailbox, STREAM_MESSAGE_LIFETIME + SECOND)
        await self._say(mailbox, key, 11)
        report = await sweep_messages(mailbox, limit=3)
        assert report.untaken == Counter({StreamMessageKind.NOTIFICATION: 7, QUESTION: 1})
        # What was given is known for longer.
        await self._say(mailbox, key, 1, 2)
        assert await self._take(mailbox, key, given) == [11]
        await read_all(mailbox, 2, {1: 11})
        await self.age_messages(mailbox, 2 * MARK_LIFETIME)
        assert await sweep_messages(mailbox) == MailboxSweepReport()

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_what_cannot_be_stored_is_refused_with_its_call(
        self, store: SessionStore, mailbox: Mailbox, text: str
    ) -> None:
        key = await self._streaming(store, mailbox)
        good, bad = new_stream_message(1, key=key, sender=1), new_stream_message(2, key=key, sender=1, body=text)
        await refused(mailbox.say([good, bad]))
        for changes in ({"sequence": -1}, {"sequence": 2**63}, {"sender": 0}, {"sender": 2**24}):
            fields = {"sequence": 2, "sender": 1} | changes
            await refused(mailbox.say([good, new_stream_message(key=key, **fields)]))
        assert await self._take(mailbox, key, {}) == []
        assert await mailbox.say([]) == Said()

    async def test_many_instances_speak_and_the_stream_moves(self, make_mailbox: MakeMailbox) -> None:
        made = [make_mailbox() for _ in range(3)]
        key = await self._streaming(made[0][0], made[0][1], None)
        streamed: list[tuple[int, int]] = []

        async def speak(sender: int) -> None:
            for number in range(30):
                assert (await self._say(made[sender - 1][1], key, number, sender=sender)).dropped == set()
                await asyncio.sleep(0.002)

        async def stream() -> None:
            """Have each instance in turn take what waits, and leave a part of it to the next."""
            turn = 0
            while len(streamed) < 90:
                (store, mailbox), number = made[turn % 3], turn % 3 + 1
                await claim_stream(store, key, number)
                given: dict[int, int] = {}
                for _ in range(3):
                    page = await mailbox.take(key, number, given=given)
                    for message in page.messages[: turn % 4 + 1]:
                        given[message.sender] = message.sequence
                        streamed.append((message.sender, message.sequence))
                await mailbox.release(key, number, given=given)
                await asyncio.sleep(0.001)
                turn += 1

        await asyncio.wait_for(asyncio.gather(stream(), *(speak(sender) for sender in (1, 2, 3))), 60)
        for sender in (1, 2, 3):
            assert [sequence for one, sequence in streamed if one == sender] == list(range(30))
