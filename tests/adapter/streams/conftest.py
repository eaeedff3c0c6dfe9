"""Fixtures of the tests of streams: instances with an event log, and a client in a session of the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.instances import instance
from tests.support.talking import Talking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.asgi import Client
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Instance


@pytest.fixture
def talking() -> Talking:
    """The server of the instance `one`."""
    return Talking()


@pytest.fixture
async def one(store: FaultyStore, log: FaultyLog, talking: Talking) -> AsyncIterator[Instance]:
    """An instance with an event log and the tool `talk`, whose calls the test controls."""
    async with instance(store, talking.notes, events=log) as one:
        yield one


@pytest.fixture
async def two(one: Instance, other_store: FaultyStore, other_log: FaultyLog) -> AsyncIterator[Instance]:
    """Another instance on the sessions and events of `one`."""
    async with instance(other_store, events=other_log) as two:
        yield two


@pytest.fixture
async def client(one: Instance) -> Client:
    """A client of `one`, in a session."""
    client = one.client()
    await client.handshake()
    return client
