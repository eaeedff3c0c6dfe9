"""The public names: which there are, and what has become of those that there were."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

import mcp_session_store

ROOT = {
    "ConfigurationError",
    "DurableSessionManager",
    "EndHook",
    "EndReason",
    "EventLog",
    "EventPolicy",
    "InstanceSettings",
    "InvalidValue",
    "JournaledMethod",
    "Mailbox",
    "MemoryEventLog",
    "MemoryMailbox",
    "MemorySessionStore",
    "MemoryStateStore",
    "NoSession",
    "RestoreHook",
    "RestoreRefused",
    "RetentionPolicy",
    "SchemaError",
    "SessionRecord",
    "SessionRestoreMarker",
    "SessionState",
    "SessionStore",
    "SessionStoreError",
    "SqlEventLog",
    "SqlKeyValue",
    "SqlMailbox",
    "SqlSessionStore",
    "SqlStateStore",
    "StateConflict",
    "StateFull",
    "StatePolicy",
    "StateStore",
    "StoreMisconfigured",
    "StoreUnavailable",
    "durable_app",
    "get_restore_marker",
    "get_session_state",
    "run_durable",
    "session_key",
}
"""What a server is written with."""

ELSEWHERE = {
    "errors": {
        "ConfigurationError",
        "EventTooLarge",
        "InvalidValue",
        "JournalFull",
        "KeyValueFull",
        "NoSession",
        "NotRunning",
        "RecordUnreadable",
        "RestoreRefused",
        "SchemaAhead",
        "SchemaBehind",
        "SchemaError",
        "SchemaMissing",
        "SessionConflict",
        "SessionLimitReached",
        "SessionStoreError",
        "StateConflict",
        "StateFull",
        "StoreBusy",
        "StoreClosed",
        "StoreMisconfigured",
        "StoreUnavailable",
    },
    "migrations": {"check", "current", "include_name", "metadata", "upgrade"},
}
"""What stands in other public modules."""

CONTRACTS = {
    "store": {"SessionStore", "DEFAULT_NAMESPACE"},
    "event_log": {"EventLog"},
    "mailbox": {"Mailbox", "Message", "MessageKind", "NewMessage", "Presence"},
    "activity": {"Activity"},
    "records": {"Change", "Changes", "JournalEntry", "NewEvent", "NewSession", "NewState", "Principal"},
    "retention": {"EventPolicy", "EventSweepReport", "RetentionPolicy", "SweepReport"},
    "state_store": {"StateStore", "StoredState"},
    "testing": {"SessionStoreConformance", "EventLogConformance", "MailboxConformance", "StateStoreConformance"},
}
"""What the author of a store finds, among other names."""

MOVED = {
    "errors": [
        "EventTooLarge",
        "JournalFull",
        "SchemaAhead",
        "SchemaBehind",
        "SchemaMissing",
        "SessionConflict",
        "SessionLimitReached",
    ],
    "activity": ["Activity"],
    "records": [
        "Change",
        "Changes",
        "EventKind",
        "EventPage",
        "JournalEntry",
        "NewEvent",
        "NewSession",
        "Principal",
        "StoredEvent",
    ],
    "retention": ["EventSweepReport", "SweepReport"],
}
"""What stood at the root, by its place now."""


def test_the_names_at_the_root_are_these() -> None:
    assert set(mcp_session_store.__all__) == ROOT
    assert len(mcp_session_store.__all__) == len(ROOT)


@pytest.mark.parametrize("module", sorted(ELSEWHERE))
def test_the_names_of_other_public_modules_are_these(module: str) -> None:
    assert set(importlib.import_module(f"mcp_session_store.{module}").__all__) == ELSEWHERE[module]


@pytest.mark.parametrize("module", sorted(CONTRACTS))
def test_the_author_of_a_store_finds_the_contract_in_its_module(module: str) -> None:
    assert set(importlib.import_module(f"mcp_session_store.{module}").__all__) >= CONTRACTS[module]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MOVED.items() for name in names])
def test_a_name_that_left_the_root_works_and_warns_of_its_new_place(module: str, name: str) -> None:
    place = importlib.import_module(f"mcp_session_store.{module}")
    with pytest.warns(DeprecationWarning, match=f"from mcp_session_store.{module} import {name}") as caught:
        found = getattr(mcp_session_store, name)
    assert found is getattr(place, name)
    assert name in place.__all__
    assert name not in mcp_session_store.__all__
    # It points to who asks, in whichever way.
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(DeprecationWarning, match=name) as caught:
        exec(compile(f"from mcp_session_store import {name}", __file__, "exec"), {"__name__": __name__})
    assert {warning.filename for warning in caught} == {__file__}


def test_no_module_of_the_package_uses_an_old_place() -> None:
    code = (
        "import pkgutil, importlib, mcp_session_store\n"
        "for found in pkgutil.walk_packages(mcp_session_store.__path__, 'mcp_session_store.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error:mcp_session_store:DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_star_brings_the_names_of_the_root_and_warns_of_nothing() -> None:
    brought: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from mcp_session_store import *", brought)
    assert brought.keys() - {"__builtins__"} == ROOT
