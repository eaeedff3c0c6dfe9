"""Fixtures of the tests of sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mcp_session_store.adapter.sessions import absences

if TYPE_CHECKING:
    from tests.support.instances import Clock


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that can be put forward. Which copies are in use is looked at when the test says so, and not in between.

    A round of the background could else come between the moment at which time passes and what the test does then.
    """
    monkeypatch.setattr(absences, "INTERVAL", 3600.0)
    return clock
