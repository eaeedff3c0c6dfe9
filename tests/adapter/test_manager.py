"""The session manager as its users see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from mcp_session_store import DurableSessionManager
from tests.support.instances import Notes

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore


def test_the_manager_has_no_public_member_that_is_not_for_users(store: FaultyStore) -> None:
    of_the_sdk = {name for name in dir(StreamableHTTPSessionManager(Notes().server)) if not name.startswith("_")}
    ours = {name for name in dir(DurableSessionManager(Notes().server, store)) if not name.startswith("_")}
    assert ours - of_the_sdk == {
        "store",
        "event_log",
        "mailbox",
        "state_store",
        "instance",
        "readiness",
        "answer_waiting",
    }
