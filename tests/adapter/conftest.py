"""Fixtures of the adapter's tests."""

from __future__ import annotations

import pytest

from tests.adapter.stores import FaultyStore


@pytest.fixture(params=[False, True], ids=["sse", "json"])
def json_response(request: pytest.FixtureRequest) -> bool:
    """Both forms of an answer to a request."""
    assert isinstance(request.param, bool)
    return request.param


@pytest.fixture
def store() -> FaultyStore:
    """The store of an instance."""
    return FaultyStore()


@pytest.fixture
def other_store(store: FaultyStore) -> FaultyStore:
    """The store of another instance, on the same sessions."""
    return FaultyStore(store.inner)
