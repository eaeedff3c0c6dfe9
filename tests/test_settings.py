"""The settings of a process: each number's default, unit and check, from code, from texts and from the environment."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
from mcp.server.streamable_http_manager import DEFAULT_MAX_SESSIONS
from pydantic import ValidationError

from mcp_session_store import ConfigurationError, DurableSessionManager, MemorySessionStore, durable_app
from mcp_session_store.settings import NOT_GIVEN, InstanceSettings, Unit
from tests.support.instances import Notes

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = [
    "evict_after",
    "end_within",
    "serve_unverified_for",
    "sweep_interval",
    "activity_interval",
    "instance_timeout",
    "replay_timeout",
]
COUNTS = ["max_sessions", "max_initialize_params"]
OPTIONAL = {"evict_after", "serve_unverified_for", "sweep_interval", "activity_interval", "max_sessions"}


def variable(name: str) -> str:
    return f"MCP_SESSION_STORE_{name.upper()}"


def test_each_setting_has_a_default_a_unit_and_a_description() -> None:
    assert InstanceSettings() == InstanceSettings(
        evict_after=300.0,
        max_sessions=DEFAULT_MAX_SESSIONS,
        end_within=5.0,
        serve_unverified_for=None,
        sweep_interval=60.0,
        activity_interval=None,
        instance_timeout=30.0,
        replay_timeout=5.0,
        outage_patience=20.0,
        max_initialize_params=8 * 1024,
    )
    assert set(InstanceSettings.model_fields) == {*SECONDS, "outage_patience", *COUNTS}
    for name, field in InstanceSettings.model_fields.items():
        unit = {"max_sessions": "Sessions", "max_initialize_params": "Bytes"}.get(name, "Seconds")
        assert (field.description or "").startswith(f"{unit} "), name
        assert Unit(unit.lower()) in field.metadata
        assert ("None: " in (field.description or "")) == (name in OPTIONAL)


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5", object])
def test_seconds_that_cannot_work_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: .*positive number of seconds"):
        InstanceSettings.given(None, **{name: value})
    with pytest.raises(ConfigurationError, match=name):
        InstanceSettings(**{name: value})


@pytest.mark.parametrize("value", [-1, 30, float("nan"), float("inf"), True, "5", None])
def test_a_patience_that_cannot_work_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"outage_patience: .*from 0 to less than 30"):
        InstanceSettings.given(None, outage_patience=value)
    assert InstanceSettings.given(None, outage_patience=0).outage_patience == 0


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, float("inf"), True, "5"])
def test_a_count_that_cannot_work_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: .*positive whole number"):
        InstanceSettings.given(None, **{name: value})
    with pytest.raises(ConfigurationError, match=name):
        InstanceSettings(**{name: value})


@pytest.mark.parametrize("name", [*SECONDS, *COUNTS])
def test_none_stands_for_what_the_description_says_or_is_refused_with_the_remedy(name: str) -> None:
    if name in OPTIONAL:
        assert getattr(InstanceSettings.given(None, **{name: None}), name) is None
        with pytest.raises(ConfigurationError, match="or none"):
            InstanceSettings.given(None, **{name: 0})
    else:
        with pytest.raises(ConfigurationError, match=f"{name}: None is not"):
            InstanceSettings.given(None, **{name: None})


def test_settings_do_not_change_and_have_no_others() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        InstanceSettings().evict_after = 5
    with pytest.raises(ConfigurationError, match="evict_afetr"):
        InstanceSettings(evict_afetr=5)  # type: ignore[call-arg]


# From the environment


@pytest.mark.parametrize("name", [*SECONDS, *COUNTS])
def test_a_variable_is_read(name: str) -> None:
    assert getattr(InstanceSettings.from_environment({variable(name): "7"}), name) == 7
    assert getattr(InstanceSettings.from_environment({variable(name): " 7 "}), name) == 7
    assert InstanceSettings.from_environment({variable(name): " "}) == InstanceSettings()
    if name in SECONDS:
        assert getattr(InstanceSettings.from_environment({variable(name): "2.5"}), name) == 2.5
    if name in OPTIONAL:
        for text in ("none", "NONE"):
            assert getattr(InstanceSettings.from_environment({variable(name): text}), name) is None


@pytest.mark.parametrize("name", [*SECONDS, *COUNTS])
@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", "5m", "True"])
def test_a_variable_that_makes_no_sense_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{variable(name)}: .* is not a positive"):
        InstanceSettings.from_environment({variable(name): text})


@pytest.mark.parametrize(
    ("name", "text"), [("end_within", "none"), ("max_sessions", "1.5"), ("replay_timeout", "none")]
)
def test_a_variable_takes_what_its_setting_takes(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=variable(name)):
        InstanceSettings.from_environment({variable(name): text})


def test_the_environment_completes_what_is_given_and_changes_none_of_it() -> None:
    environment = {variable("evict_after"): "7", variable("end_within"): "8", variable("max_sessions"): ""}
    assert InstanceSettings(evict_after=1).completed(environment) == InstanceSettings(evict_after=1, end_within=8)
    # Also a value that is the default's.
    assert InstanceSettings(end_within=5).completed(environment) == InstanceSettings(evict_after=7)
    # A variable that does not count is not looked at.
    environment[variable("end_within")] = "soon"
    assert InstanceSettings(end_within=2).completed(environment) == InstanceSettings(evict_after=7, end_within=2)
    with pytest.raises(ConfigurationError, match=variable("end_within")):
        InstanceSettings().completed(environment)


# By keyword, or all at once


def test_settings_are_given_at_once_or_by_keyword() -> None:
    settings = InstanceSettings(evict_after=7)
    assert InstanceSettings.given(settings, evict_after=NOT_GIVEN) is settings
    assert InstanceSettings.given(None, evict_after=7, end_within=NOT_GIVEN) == settings
    with pytest.raises(ConfigurationError, match=r"end_within and settings= are given at once; give all"):
        InstanceSettings.given(settings, evict_after=NOT_GIVEN, end_within=5.0)


@pytest.mark.parametrize("settings", [{"evict_after": 7}, 7, True], ids=str)
def test_what_are_no_settings_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigurationError, match="InstanceSettings"):
        InstanceSettings.given(settings)


def test_a_manager_takes_settings_or_keywords() -> None:
    server, store = Notes().server, MemorySessionStore()
    for arguments in ({"settings": InstanceSettings(max_sessions=3)}, {"max_sessions": 3}):
        assert DurableSessionManager(server, store, **arguments).max_sessions == 3
    with pytest.raises(ConfigurationError, match="max_sessions and settings="):
        DurableSessionManager(server, store, settings=InstanceSettings(), max_sessions=3)


def test_a_manager_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("max_sessions"), "3")
    manager = DurableSessionManager(Notes().server, MemorySessionStore())
    assert manager.max_sessions == DEFAULT_MAX_SESSIONS


@pytest.mark.parametrize("taker", [DurableSessionManager.__init__, durable_app])
def test_each_setting_is_a_keyword_where_settings_are_taken(taker: Callable[..., object]) -> None:
    parameters = inspect.signature(taker).parameters
    assert "settings" in parameters
    for name in InstanceSettings.model_fields:
        assert parameters[name].default is NOT_GIVEN, name
