"""Conformance suite for session stores, one module a capability."""

from mcp_session_store.testing.sessions.calls import Calls
from mcp_session_store.testing.sessions.changes import ChangesAndHints
from mcp_session_store.testing.sessions.claims import Claims
from mcp_session_store.testing.sessions.journal import Journal
from mcp_session_store.testing.sessions.lifetimes import Lifetimes
from mcp_session_store.testing.sessions.limits import Limits
from mcp_session_store.testing.sessions.namespaces import Namespaces
from mcp_session_store.testing.sessions.records import Records
from mcp_session_store.testing.sessions.streams import Streams
from mcp_session_store.testing.sessions.suite import MakeStore
from mcp_session_store.testing.sessions.sweeping import Sweeping
from mcp_session_store.testing.sessions.values import Values

__all__ = ["SessionStoreConformance", "MakeStore"]


class SessionStoreConformance(
    Records, Claims, Streams, Lifetimes, Sweeping, ChangesAndHints, Journal, Limits, Namespaces, Values, Calls
):
    """Tests that every `SessionStore` passes.

    Subclass it, and override the fixture `make_store` and the methods `expire` and `age_tombstone`.
    """
