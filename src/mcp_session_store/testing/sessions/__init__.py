"""The conformance suite of session stores, put together from its parts."""

from mcp_session_store.testing.sessions.calls import Calls
from mcp_session_store.testing.sessions.changes import ChangesAndHints
from mcp_session_store.testing.sessions.claims import Claims
from mcp_session_store.testing.sessions.journal import Journal
from mcp_session_store.testing.sessions.lifetimes import Lifetimes
from mcp_session_store.testing.sessions.limits import Limits
from mcp_session_store.testing.sessions.namespaces import Namespaces
from mcp_session_store.testing.sessions.records import Records
from mcp_session_store.testing.sessions.suite import MakeStore
from mcp_session_store.testing.sessions.sweeping import Sweeping
from mcp_session_store.testing.sessions.values import Values

__all__ = ["SessionStoreConformance", "MakeStore"]


class SessionStoreConformance(
    Records, Claims, Lifetimes, Sweeping, ChangesAndHints, Journal, Limits, Namespaces, Values, Calls
):
    """What every `SessionStore` does. Subclass it, and give the fixture `make_store` and the two methods."""
