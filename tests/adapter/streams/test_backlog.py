"""What waits in an outage has bounds, and each principal and session has a share of them."""

from __future__ import annotations

import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.adapter.streams import backlog as backlog_module
from mcp_session_store.adapter.streams.backlog import SMALL_ANSWER, Backlog
from mcp_session_store.adapter.streams.calls import call_error
from mcp_session_store.event_log import LARGE_APPEND, STANDALONE_STREAM
from mcp_session_store.records import EventKind, NewEvent, message_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable
    from uuid import UUID

    from mcp_session_store.adapter.streams.backlog import Followed

ALL = 1200
EACH = 600


class Kept:
    """A backlog, and what has become of its events."""

    def __init__(self) -> None:
        self.backlog = Backlog(self._instead_of, self._dropped)
        self.dropped = 0
        self.follows: dict[tuple[str, int], int] = {}
        self._position = 0

    def _instead_of(self, event: NewEvent) -> NewEvent:
        return NewEvent(stream=event.stream, position=event.position, kind=EventKind.ERROR, message="!")

    def _dropped(self, number: int, followed: Followed) -> None:
        self.dropped += number
        self.follows.update(followed)

    def add(self, key: UUID, owner: Hashable, size: int, kind: EventKind = EventKind.RESPONSE) -> bool:
        """Have an event of a call wait, if there is room."""
        self._position += 1
        stream = f"{key}"
        event = NewEvent(
            stream=stream, position=self._position, previous=self._position - 1, kind=kind, message="x" * size
        )
        return self.backlog.add(key, event, owner=owner, uncertain=False)

    def tell(self, key: UUID, owner: Hashable, size: int) -> bool:
        """Have a notification wait, if there is room."""
        return self.add(key, owner, size, EventKind.NOTIFICATION)

    def sizes(self, key: UUID) -> list[int]:
        """Return the sizes of the events of a session that wait."""
        waiting = self.backlog.sessions.get(key)
        return [] if waiting is None else [message_bytes(event) for event in waiting.events]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(backlog_module, "MAX_BYTES_IN_ALL", ALL)
    monkeypatch.setattr(backlog_module, "MAX_BYTES", EACH)
    monkeypatch.setattr(backlog_module, "SMALL_ANSWER", 1)
    return Kept()


def keys(number: int) -> list[UUID]:
    return [uuid.uuid4() for _ in range(number)]


def test_an_answer_takes_the_place_of_what_the_principal_with_the_most_holds(kept: Kept) -> None:
    a, b, c, other = keys(4)
    for key in (a, b, c):
        assert kept.tell(key, "greedy", 100)
        assert kept.add(key, "greedy", 300)
    assert kept.add(other, "modest", 150)
    # Notifications before answers, and of the session with the most.
    assert sorted(map(kept.sizes, (a, b, c))) == [[100, 300], [300], [300]]
    assert kept.dropped == 2
    assert kept.add(other, "modest", 200)
    assert kept.add(other, "modest", 200)
    # Then answers, in whose place an error waits.
    assert sorted(map(kept.sizes, (a, b, c))) == [[1], [300], [300]]
    assert kept.sizes(other) == [150, 200, 200]


def test_a_principal_that_holds_its_share_pushes_nothing_out(kept: Kept) -> None:
    a, b, other = keys(3)
    assert kept.add(a, "first", 500)
    assert kept.add(other, "second", 500)
    assert kept.add(b, "first", 200)
    # The first has more than its share, and the second would have.
    assert not kept.add(other, "second", 101)
    assert not kept.tell(b, "first", 1)
    assert kept.add(other, "second", 100)
    assert (kept.sizes(a), kept.sizes(b), kept.sizes(other)) == ([1], [200], [500, 100])


def test_no_session_of_a_principal_pushes_out_those_of_the_same_one_beyond_its_part(kept: Kept) -> None:
    a, b, c = keys(3)
    assert kept.add(a, None, 600)
    assert kept.add(b, None, 350)
    assert kept.add(c, None, 250)
    assert not kept.add(b, None, 100)
    assert not kept.add(c, None, 151)
    assert kept.add(c, None, 150)
    assert (kept.sizes(a), kept.sizes(b), kept.sizes(c)) == ([1], [350], [250, 150])


def test_sessions_without_a_principal_share_as_one(kept: Kept) -> None:
    strangers, user = keys(6), uuid.uuid4()
    for key in strangers:
        assert kept.add(key, None, 200)
    assert kept.add(user, "user", 600)
    assert sum(sum(kept.sizes(key)) for key in strangers) <= 600


def test_within_a_session_an_answer_goes_before_notifications_and_these_before_nothing(kept: Kept) -> None:
    key = uuid.uuid4()
    for _ in range(3):
        assert kept.tell(key, None, 200)
    assert not kept.tell(key, None, 1)
    assert kept.add(key, None, 300)
    assert kept.sizes(key) == [200, 300]
    assert not kept.add(key, None, 301)
    assert kept.add(key, None, 100)


def test_a_session_whose_events_are_as_many_as_may_wait_keeps_its_answer(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_EVENTS", 3)
    key = uuid.uuid4()
    for size in (1, 2, 3):
        assert kept.tell(key, None, size)
    assert not kept.tell(key, None, 4)
    assert kept.add(key, None, 5)
    assert kept.sizes(key) == [1, 2, 5]


def test_what_follows_a_lost_notification_follows_what_was_before_it(kept: Kept) -> None:
    key, other = keys(2)
    for _ in range(3):
        assert kept.tell(key, None, 100)
    assert kept.add(key, None, 300)
    assert kept.add(other, None, 600)
    assert kept.add(uuid.uuid4(), None, 150)
    # The second and the third are gone, and a reader must not miss them before the answer.
    first, answer = kept.backlog.sessions[key].events
    assert (first.position, answer.previous) == (1, 1)
    assert kept.follows == {(str(key), 2): 1, (str(key), 3): 1}


def test_a_lost_question_leaves_a_gap(kept: Kept) -> None:
    key = uuid.uuid4()
    assert kept.add(key, None, 300, EventKind.REQUEST)
    assert kept.add(key, None, 400)
    (answer,) = kept.backlog.sessions[key].events
    assert answer.previous == 1  # the question's position
    assert kept.follows == {}


def test_what_is_being_stored_stays(kept: Kept) -> None:
    a, b, other = keys(3)
    for key in (a, b):
        assert kept.tell(key, "greedy", 300)
        assert kept.add(key, "greedy", 300)
        kept.backlog.sessions[key].being_stored = 2
    assert not kept.add(other, "modest", 100)
    kept.backlog.sessions[a].being_stored = 1
    kept.backlog.sessions[b].being_stored = 1
    assert kept.add(other, "modest", 100)
    assert sorted(map(kept.sizes, (a, b))) == [[300, 1], [300, 300]]


def test_what_is_stored_together_is_no_large_append() -> None:
    kept, key = Kept(), uuid.uuid4()
    sizes = [LARGE_APPEND // 2, LARGE_APPEND // 2, 1, 3 * LARGE_APPEND, 1]
    for position, size in enumerate(sizes):
        event = NewEvent(stream=STANDALONE_STREAM, position=position, kind=EventKind.NOTIFICATION, message="x" * size)
        kept.backlog.put(key, event, owner=None, uncertain=False)
    waiting = kept.backlog.sessions[key]
    stored = []
    while waiting.events:
        events = waiting.next(100)
        stored.append([message_bytes(event) for event in events])
        for _ in events:
            kept.backlog.remove_first(waiting)
    assert stored == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]


def test_room_is_made_in_few_steps_whatever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "MAX_BYTES_IN_ALL", 2 * 1024**2)
    kept, greedy, modest = Kept(), keys(40), uuid.uuid4()
    for number in range(7000):
        kept.add(greedy[number % 40], "greedy", 300)
    calls = 0

    def count(_frame: object, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        assert kept.add(modest, "modest", 1024**2)
    finally:
        sys.setprofile(None)
    # 3500 answers have made room.
    assert calls < 60_000


def test_the_error_in_place_of_an_answer_is_no_larger_than_the_answers_that_are_passed_over() -> None:
    longest = call_error(
        f"{'x' * 98}", "The answer to the call could not be kept: too much was waiting to be stored", reason="lost"
    )
    assert len(longest) <= SMALL_ANSWER
