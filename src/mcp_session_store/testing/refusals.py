"""Texts that cannot be stored, and the check that a call refuses them."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.errors import InvalidValue

if TYPE_CHECKING:
    from collections.abc import Awaitable

_PAYLOAD = "".join(["pay", "load"])

UNSTORABLE_TEXTS = [
    pytest.param(f"{_PAYLOAD} \0 x", id="NUL"),
    pytest.param(f"{_PAYLOAD} \ud800 x", id="lone surrogate"),
]


async def refused(call: Awaitable[Any]) -> None:
    """Assert that a call raises `InvalidValue`, and that neither it nor its cause shows the value."""
    with pytest.raises(InvalidValue) as refusal:
        await call
    assert _PAYLOAD not in "".join(traceback.format_exception(refusal.value))
