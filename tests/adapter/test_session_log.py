"""One line of the log for each thing that becomes of a session, with fields for programs that read logs."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from mcp_session_store import EndReason, SqlSessionStore, session_key
from mcp_session_store.adapter import session_log
from mcp_session_store.adapter.session_log import FIELDS, LOGGER, REFUSALS_LOGGED
from tests.support.asgi import until
from tests.support.instances import instance, principal
from tests.support.pages import text_of

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio


class AsJson(logging.Formatter):
    """As formatters for log collectors work: all that a record has beyond what every record has."""

    USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in self.USUAL}
        return json.dumps({"message": record.getMessage(), "level": record.levelname, **extra})


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the lines about sessions since the last time, as a collector of logs gets them."""
    records = [record for record in caplog.records if record.name == LOGGER and record.levelno >= logging.INFO]
    caplog.clear()
    return [json.loads(AsJson().format(record)) for record in records]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="mcp_session_store")
    return caplog


async def test_what_becomes_of_a_session_is_logged_in_one_line_each(
    store: FaultyStore, other_store: FaultyStore, log: pytest.LogCaptureFixture
) -> None:
    async with instance(store, max_sessions=1, sweep_interval=None) as one:
        client = one.client()
        session_id = await client.handshake()
        key = str(session_key(session_id))
        (opened,) = lines(log)
        assert opened["message"] == f"the session {key} was opened by raw 1"
        who = {"mcp_session_key": key, "mcp_client_name": "raw", "mcp_client_version": "1"}
        where = {"mcp_namespace": "default", "mcp_instance": one.manager.instance}
        assert opened.pop("mcp_duration") >= 0
        assert opened == {
            "message": opened["message"],
            "level": "INFO",
            "mcp_event": "opened",
            **who,
            **where,
        }
        await client.ping()
        await client.call("add", {"a": 1, "b": 2})
        assert lines(log) == [], "nothing for each request"
        await one.client().handshake()
        await one.at_rest()
        evicted = next(line for line in lines(log) if line["mcp_event"] == "evicted")
        assert evicted["message"] == f"the session {key} was evicted: memory full"
        assert evicted.items() >= (who | where | {"mcp_reason": "memory full"}).items()
        await client.ping()
        restored = next(line for line in lines(log) if line["mcp_event"] == "restored")
        assert re.fullmatch(
            f"the session {key} of raw 1 was restored in \\d+\\.\\d{{3}} s, from instance "
            f"{re.escape(one.manager.instance)} \\(restore 1\\)",
            restored["message"],
        )
        assert restored.items() >= (who | where | {"mcp_previous_instance": one.manager.instance}).items()
        assert (restored["mcp_restores"], restored["mcp_duration"] >= 0) == (1, True)
        await client.delete()
        (ended,) = lines(log)
        assert (ended["message"], ended["mcp_reason"]) == (f"the session {key} ended: client", "client")
        assert ended["mcp_duration"] >= 0
        await client.ping()
        (refused,) = lines(log)
        assert refused["message"] == f"a request for the session {key} is refused: ended"
        assert refused.items() >= {"mcp_event": "refused", "mcp_session_key": key, "mcp_reason": "ended"}.items()
        elsewhere_id = await one.client().handshake()
        lines(log)
        await other_store.end(session_key(elsewhere_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        assert [line["mcp_reason"] for line in lines(log)] == ["operator"]
        await one.client().handshake()
        lines(log)
    (stopping,) = lines(log)
    assert stopping["message"] == "this instance stops: 1 of its sessions leave memory, and stay stored"
    assert session_id not in log.text


async def test_fields_that_an_application_gives_its_records_break_no_request(
    store: FaultyStore, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = logging.getLogRecordFactory()

    def with_fields(*arguments: Any, **others: Any) -> logging.LogRecord:
        record = make(*arguments, **others)
        record.mcp_session_key, record.mcp_reason = "the application's", None
        return record

    def add_fields(record: logging.LogRecord) -> bool:
        record.mcp_instance = "its filter's"
        return True

    monkeypatch.setattr(logging, "_logRecordFactory", with_fields)
    logging.getLogger(LOGGER).addFilter(add_fields)
    try:
        async with instance(store, max_sessions=1) as one:
            client = one.client()
            await client.handshake()
            await client.delete()
            await client.ping()
    finally:
        logging.getLogger(LOGGER).removeFilter(add_fields)
    shown = lines(log)
    assert [line["mcp_event"] for line in shown] == ["opened", "ended", "refused", "stopping"]
    for line in shown:
        assert (line["mcp_session_key"], line["mcp_reason"]) == ("the application's", None)
        assert (line["mcp_instance"], line["mcp_namespace"]) == ("its filter's", "default")


def test_no_field_has_a_name_that_every_record_has() -> None:
    assert not FIELDS.keys() & AsJson.USUAL
    assert all(name.startswith("mcp_") for name in FIELDS)


async def test_strangers_cannot_flood_the_log(store: FaultyStore, log: pytest.LogCaptureFixture) -> None:
    async with instance(store, sweep_interval=None) as one:
        for _ in range(REFUSALS_LOGGED + 20):
            await one.client(uuid4().hex).ping()
        shown = lines(log)
        assert [line["mcp_reason"] for line in shown] == ["unknown"] * REFUSALS_LOGGED
        # A reason of its own has lines of its own.
        alices = one.client(user=principal("alice"))
        session_id = await alices.handshake()
        lines(log)
        await one.client(session_id).ping()
        assert [line["mcp_reason"] for line in lines(log)] == ["another principal"]


async def test_what_was_left_out_is_said_later(store: FaultyStore, log: pytest.LogCaptureFixture, clock: Any) -> None:
    async with instance(store, sweep_interval=None, evict_after=None) as one:
        for _ in range(REFUSALS_LOGGED + 20):
            await one.client(uuid4().hex).ping()
        lines(log)
        clock.ahead += session_log.WINDOW + 1
        await one.client(uuid4().hex).ping()
        (line,) = [line for line in lines(log) if line["mcp_event"] == "refused"]
        assert line["message"].endswith("is refused: unknown (and 20 more since the last such line)")


def test_no_field_is_an_attribute_of_log_records() -> None:
    record = logging.makeLogRecord({})
    assert all(name.startswith("mcp_") and not hasattr(record, name) for name in FIELDS)


def test_the_page_has_the_fields_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text_of("reference/logs.md"), re.MULTILINE))
    assert rows == FIELDS


async def test_the_first_start_logs_one_line_of_its_migration(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        store = SqlSessionStore(sqlite_url)
        await store.open()
        await store.aclose()
    (line,) = [record.getMessage() for record in caplog.records if record.name.partition(".")[0] != "asyncio"]
    assert re.fullmatch(r"the schema of sqlite\S+ was migrated from nothing to \d+_\d+_\w+", line)
