"""Conformance suite for event logs, one module a capability."""

from mcp_session_store.testing.events.appending import Appending
from mcp_session_store.testing.events.calls import Calls
from mcp_session_store.testing.events.hints import HeadsAndHints
from mcp_session_store.testing.events.limits import Limits
from mcp_session_store.testing.events.namespaces import Namespaces
from mcp_session_store.testing.events.reading import Reading
from mcp_session_store.testing.events.session_ends import SessionEnds
from mcp_session_store.testing.events.suite import MakeLog
from mcp_session_store.testing.events.sweeping import Sweeping
from mcp_session_store.testing.events.values import Values

__all__ = ["EventLogConformance", "MakeLog"]


class EventLogConformance(Appending, Reading, SessionEnds, Limits, Sweeping, Namespaces, HeadsAndHints, Values, Calls):
    """Tests that every `EventLog` passes.

    Subclass it, and override the fixture `make_log` and the methods `expire` and `age_events`.
    """
