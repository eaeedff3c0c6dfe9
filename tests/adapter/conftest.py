"""Fixtures of the adapter's tests."""

from __future__ import annotations

import anyio
import pytest

from mcp_session_store.adapter import clock as adapter_clock
from tests.support.faulty_stores import FaultyLog, FaultyStore, Sessions
from tests.support.instances import Clock


@pytest.fixture(params=[False, True], ids=["sse", "json"])
def json_response(request: pytest.FixtureRequest) -> bool:
    """Both forms of an answer to a request."""
    assert isinstance(request.param, bool)
    return request.param


@pytest.fixture
def sessions() -> Sessions:
    """Sessions that the stores share."""
    return Sessions()


@pytest.fixture
def store(sessions: Sessions) -> FaultyStore:
    """The store of an instance."""
    return FaultyStore(sessions)


@pytest.fixture
def other_store(store: FaultyStore) -> FaultyStore:
    """The store of another instance, on the same sessions."""
    return FaultyStore(store.inner)


@pytest.fixture
def log(store: FaultyStore) -> FaultyLog:
    """The event log of an instance."""
    return FaultyLog(store)


@pytest.fixture
def other_log(other_store: FaultyStore) -> FaultyLog:
    """The event log of another instance, with the same events."""
    return FaultyLog(other_store)


@pytest.fixture
def clock(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that can be put forward."""
    real, real_now = anyio.current_time, adapter_clock.now
    clock = Clock(sessions)
    monkeypatch.setattr(anyio, "current_time", lambda: real() + clock.ahead)
    monkeypatch.setattr(adapter_clock, "now", lambda: real_now() + clock.ahead)
    return clock
