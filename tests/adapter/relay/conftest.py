"""Fixtures of the relay's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.faulty_stores import FaultyMailbox

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore


@pytest.fixture
def mailbox(store: FaultyStore) -> FaultyMailbox:
    """The mailbox of an instance."""
    return FaultyMailbox(store.inner)


@pytest.fixture
def other_mailbox(other_store: FaultyStore) -> FaultyMailbox:
    """The mailbox of another instance, with the same messages."""
    return FaultyMailbox(other_store.inner)
