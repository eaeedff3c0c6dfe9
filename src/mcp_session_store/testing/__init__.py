"""Conformance tests of the `SessionStore` and `EventLog` contracts, for anybody who writes one. Needs pytest.

```python
from collections.abc import Iterator
import pytest
from mcp_session_store.testing import MakeStore, SessionStoreConformance

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
```

Write `pytest.register_assert_rewrite("mcp_session_store.testing")` into your `conftest.py`, before the import: a
test that fails then says what it compared. The tests are asynchronous and run under the pytest plugin of anyio,
which this package depends on.
"""

from mcp_session_store.testing.events import EventLogConformance, MakeLog
from mcp_session_store.testing.factories import new_event, new_session
from mcp_session_store.testing.sessions import MakeStore, SessionStoreConformance

__all__ = [
    "EventLogConformance",
    "MakeLog",
    "MakeStore",
    "SessionStoreConformance",
    "new_event",
    "new_session",
]
