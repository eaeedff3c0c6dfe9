"""Conformance tests of the contracts of stores, for authors of implementations. Needs pytest.

```python
import pytest
from mcp_session_store import EventLog, EventPolicy, Mailbox, SessionStore, StatePolicy, StateStore
from mcp_session_store.testing import (
    EventLogConformance,
    MailboxConformance,
    MakeLog,
    MakeMailbox,
    MakeState,
    MakeStore,
    SessionStoreConformance,
    StateStoreConformance,
)

class TestMyStore(SessionStoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        data = MyData()
        return lambda namespace: MyStore(data, namespace=namespace)

    async def expire(self, store, key):
        await store.set_expiry_to_one_second_ago(key)

    async def age_tombstone(self, store, key):
        await store.set_end_to_two_days_ago(key)

class TestMyLog(EventLogConformance):
    @pytest.fixture
    def make_log(self) -> MakeLog:
        data = MyData()

        def make(namespace: str = "default", *, policy: EventPolicy | None = None) -> tuple[SessionStore, EventLog]:
            store = MyStore(data, namespace=namespace)
            return store, MyLog(store, policy=policy)

        return make

    async def expire(self, store, key):
        await store.set_expiry_to_one_second_ago(key)

    async def age_events(self, log, key):
        await log.set_times_to_two_days_ago(key)

class TestMyMailbox(MailboxConformance):
    @pytest.fixture
    def make_mailbox(self) -> MakeMailbox:
        data = MyData()

        def make(namespace: str = "default") -> tuple[SessionStore, Mailbox]:
            store = MyStore(data, namespace=namespace)
            return store, MyMailbox(store)

        return make

    async def expire(self, store, key):
        await store.set_expiry_to_one_second_ago(key)

    async def age_instance(self, mailbox, instance, by):
        await mailbox.move_last_heartbeat_back(instance, by)

    async def age_messages(self, mailbox, by):
        await mailbox.move_times_of_messages_back(by)

class TestMyState(StateStoreConformance):
    @pytest.fixture
    def make_state(self) -> MakeState:
        data = MyData()

        def make(namespace: str = "default", *, policy: StatePolicy | None = None) -> tuple[SessionStore, StateStore]:
            store = MyStore(data, namespace=namespace)
            return store, MyState(store, policy=policy)

        return make

    async def expire(self, store, key):
        await store.set_expiry_to_one_second_ago(key)

    async def age_state(self, state, key, by):
        await state.move_ends_of_times_back(key, by)
```

Call `pytest.register_assert_rewrite("mcp_session_store.testing")` in your `conftest.py` before the import, so that a
failing test shows the values that it compared. The tests are asynchronous and run under the pytest plugin of anyio,
which this package depends on. Each suite is put together from one class a capability; their names may change.
"""

from mcp_session_store.testing.events import EventLogConformance, MakeLog
from mcp_session_store.testing.factories import new_event, new_message, new_presence, new_session, new_state
from mcp_session_store.testing.mailbox import MailboxConformance, MakeMailbox
from mcp_session_store.testing.sessions import MakeStore, SessionStoreConformance
from mcp_session_store.testing.state import MakeState, StateStoreConformance

__all__ = [
    "EventLogConformance",
    "MailboxConformance",
    "MakeLog",
    "MakeMailbox",
    "MakeState",
    "MakeStore",
    "SessionStoreConformance",
    "StateStoreConformance",
    "new_event",
    "new_message",
    "new_presence",
    "new_session",
    "new_state",
]
