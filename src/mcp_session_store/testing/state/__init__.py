"""Conformance suite for stores of session state, one module a capability."""

from mcp_session_store.testing.state.bounds import Bounds
from mcp_session_store.testing.state.comparing import Comparing
from mcp_session_store.testing.state.namespaces import Namespaces
from mcp_session_store.testing.state.new_sessions import NewSessions
from mcp_session_store.testing.state.session_ends import SessionEnds
from mcp_session_store.testing.state.suite import MakeState
from mcp_session_store.testing.state.times import Times
from mcp_session_store.testing.state.values import Values
from mcp_session_store.testing.state.watching import Watching

__all__ = ["MakeState", "StateStoreConformance"]


class StateStoreConformance(Values, Comparing, Bounds, Times, Watching, NewSessions, SessionEnds, Namespaces):
    """Tests that every `StateStore` passes.

    Subclass it, and override the fixture `make_state` and the methods `expire` and `age_state`.
    """
