"""What journaled calls have set in one copy, and which of these calls are under way in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_session_store.adapter.replay.journal import StateName

__all__ = ["OwnCall", "SetState"]


class OwnCall:
    """A journaled call of the client to this copy, from before its handler runs until it is committed.

    Args:
        name: Name of the state that it sets.
    """

    __slots__ = ("name", "overtaken")

    def __init__(self, name: StateName) -> None:
        self.name = name
        self.overtaken = False
        """Whether a call of another copy has set the same state meanwhile, in an order that is not known."""


class SetState:
    """What journaled calls have set in one copy.

    Args:
        names: Names of the states that are set.
    """

    __slots__ = ("_own", "_running", "ahead", "names")

    def __init__(self, names: Iterable[StateName] = ()) -> None:
        self.names = set(names)
        """Names of the states that are set. The journal is bounded, and so are they."""
        self.ahead: dict[int, StateName] = {}
        """Revisions that calls to this copy have made before it had all that came before them."""
        self._own: list[OwnCall] = []
        self._running: StateName | None = None
        """Name of the state that a call of another copy sets now."""

    def begin_own(self, name: StateName) -> OwnCall:
        """Note that the handler of a call to this copy is going to run."""
        call = OwnCall(name)
        self._own.append(call)
        return call

    def end_own(self, call: OwnCall) -> None:
        """Note that a call is committed, or was not."""
        self._own.remove(call)

    def is_last(self, call: OwnCall) -> bool:
        """Return whether no call of another copy has set the same state since the handler of a call began."""
        return not call.overtaken and self._running != call.name

    def keep(self, name: StateName, *, is_set: bool) -> None:
        """Note that a state is set, or undone."""
        if is_set:
            self.names.add(name)
        else:
            self.names.discard(name)

    def begin_other(self, name: StateName) -> None:
        """Note that the handler of a call of another copy is going to run; one after the other."""
        self._running = name

    def end_other(self) -> None:
        """Note that it has run."""
        for call in self._own:
            if call.name == self._running:
                call.overtaken = True
        self._running = None

    def has_later(self, name: StateName, revision: int) -> bool:
        """Return whether a call to this copy, after a revision, has set a state."""
        return any(made > revision and set_ == name for made, set_ in self.ahead.items())

    def reached(self, revision: int) -> int:
        """Return the revision up to which the copy has everything, when it has all up to another one."""
        for made in [made for made in self.ahead if made <= revision]:
            del self.ahead[made]
        while self.ahead.pop(revision + 1, None) is not None:
            revision += 1
        return revision
