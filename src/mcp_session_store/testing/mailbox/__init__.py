"""Conformance suite for mailboxes, one module a capability."""

from mcp_session_store.testing.mailbox.calls import Calls
from mcp_session_store.testing.mailbox.instances import Instances
from mcp_session_store.testing.mailbox.listening import Listening
from mcp_session_store.testing.mailbox.namespaces import Namespaces
from mcp_session_store.testing.mailbox.numbers import Numbers
from mcp_session_store.testing.mailbox.order import Order
from mcp_session_store.testing.mailbox.posting import Posting
from mcp_session_store.testing.mailbox.receiving import Receiving
from mcp_session_store.testing.mailbox.repetition import Repetition
from mcp_session_store.testing.mailbox.session_ends import SessionEnds
from mcp_session_store.testing.mailbox.stream_messages import StreamMessages
from mcp_session_store.testing.mailbox.suite import MakeMailbox
from mcp_session_store.testing.mailbox.sweeping import Sweeping
from mcp_session_store.testing.mailbox.values import Values

__all__ = ["MailboxConformance", "MakeMailbox"]


class MailboxConformance(
    Instances,
    Numbers,
    Posting,
    Repetition,
    Order,
    Receiving,
    SessionEnds,
    StreamMessages,
    Sweeping,
    Listening,
    Namespaces,
    Values,
    Calls,
):
    """Tests that every `Mailbox` passes.

    Subclass it, and override the fixture `make_mailbox` and the methods `expire`, `age_instance` and `age_messages`.
    """
