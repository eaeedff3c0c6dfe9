"""The retention policy: how it reaches the store, and what a client sees of its limits."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import fastmcp
import pytest

from mcp_session_store import (
    ConfigurationError,
    DurableSessionManager,
    EndReason,
    MemorySessionStore,
    RetentionPolicy,
    SqlSessionStore,
    durable_app,
)
from mcp_session_store import app as app_module
from mcp_session_store.environment import ENVIRONMENT_PREFIX
from tests.support.asgi import seen_by_a_client, until
from tests.support.faulty_stores import FaultyStore, Sessions
from tests.support.frameworks import Made
from tests.support.instances import Notes, instance, principal
from tests.support.internals import activity_of, registry_of, stopping_in

if TYPE_CHECKING:
    from tests.support.instances import Clock

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
LONG = 3600.0
"""Seconds between polls of changes, so that none comes between where the clock is put forward."""


@pytest.fixture(params=["MCPServer", "Server", "FastMCP"])
def kind(request: pytest.FixtureRequest) -> str:
    """A framework."""
    kind: str = request.param
    return kind


# The SDK's idle timeout


async def test_an_idle_timeout_is_the_policys_idle_time_and_leaves_the_rest(kind: str) -> None:
    policy = RetentionPolicy(absolute=HOUR, per_principal=3, per_principal_excess="refuse")
    store = MemorySessionStore(retention=policy)
    Made(kind).app(store, session_idle_timeout=90.5)
    assert store.retention == policy.model_copy(update={"idle": timedelta(seconds=90.5)})


async def test_an_idle_timeout_of_none_means_never(kind: str) -> None:
    store = MemorySessionStore()
    Made(kind).app(store, session_idle_timeout=None)
    # FastMCP reads None as "take the settings' default", which is none of ours.
    assert store.retention.idle == (timedelta(hours=24) if kind == "FastMCP" else None)


async def test_without_an_idle_timeout_the_policy_stays(kind: str) -> None:
    policy = RetentionPolicy(idle=HOUR)
    store = MemorySessionStore(retention=policy)
    Made(kind).app(store)
    assert store.retention is policy


async def test_the_fastmcp_settings_set_the_idle_time_unless_they_are_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmcp.settings, "http_session_idle_timeout", "auto")
    store = MemorySessionStore()
    Made("FastMCP").app(store)
    assert store.retention == RetentionPolicy()
    Made("FastMCP").app(store, session_idle_timeout="auto")
    assert store.retention == RetentionPolicy()
    Made("FastMCP").app(store, session_idle_timeout=30)
    assert store.retention.idle == timedelta(seconds=30)
    monkeypatch.setattr(fastmcp.settings, "http_session_idle_timeout", None)
    store = MemorySessionStore()
    Made("FastMCP").app(store)
    assert store.retention.idle is None
    monkeypatch.setattr(fastmcp.settings, "http_session_idle_timeout", 45.0)
    with pytest.raises(ConfigurationError, match="session_idle_timeout"):
        Made("FastMCP").app(MemorySessionStore(retention=RetentionPolicy(idle=HOUR)))


async def test_an_idle_timeout_and_an_idle_time_are_too_much(kind: str) -> None:
    for idle in (HOUR, None, timedelta(hours=24)):
        store = MemorySessionStore(retention=RetentionPolicy(idle=idle))
        with pytest.raises(ConfigurationError, match=r"session_idle_timeout.*idle"):
            Made(kind).app(store, session_idle_timeout=90)
        assert store.retention.idle == idle
    with pytest.raises(ConfigurationError, match=r"session_idle_timeout.*idle"):
        DurableSessionManager(
            Notes().server, MemorySessionStore(retention=RetentionPolicy(idle=HOUR)), session_idle_timeout=None
        )


async def test_an_app_with_an_idle_timeout_can_be_started_again(kind: str, store: FaultyStore) -> None:
    app = Made(kind).app(store, session_idle_timeout=90)
    for _ in range(2):
        async with app.router.lifespan_context(app):
            assert store.retention.idle == timedelta(seconds=90)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "90"])
async def test_an_idle_timeout_that_cannot_work_is_refused_by_name(value: Any) -> None:
    store = MemorySessionStore()
    with pytest.raises(ConfigurationError, match="session_idle_timeout"):
        DurableSessionManager(Notes().server, store, session_idle_timeout=value)
    assert store.retention == RetentionPolicy()


@pytest.mark.parametrize("name", ["end_within", "evict_after", "sweep_interval", "activity_interval", "replay_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5"])
async def test_seconds_that_cannot_work_are_refused_by_name(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Made(kind).app(MemorySessionStore(), **{name: value})


async def test_an_idle_timeout_ends_sessions_on_all_instances(sessions: Sessions, clock: Clock) -> None:
    store, other_store = FaultyStore(sessions), FaultyStore(sessions)
    async with (
        instance(store, session_idle_timeout=60, evict_after=None, end_within=LONG) as one,
        instance(other_store, evict_after=None, end_within=LONG) as two,
    ):
        client = one.client()
        session_id = await client.begin()
        assert (await two.client(session_id).request("tools/list")).status == 200
        await until(lambda: not any(s.busy for i in (one, two) for s in registry_of(i.manager)))
        for each in (one, two):
            await activity_of(each.manager).report(everything=True)
        clock.advance(timedelta(seconds=61))
        for each in (one, two):
            assert (await each.client(session_id).request("tools/list")).status == 404


# From code and from the environment


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RetentionPolicy | None]:
    """The policies that stores were made with from a URL."""
    policies: list[RetentionPolicy | None] = []

    class Recorded(SqlSessionStore):
        def __init__(self, url: str, *, retention: RetentionPolicy | None = None, **options: Any) -> None:
            policies.append(retention)
            super().__init__(url, retention=retention, **options)

    monkeypatch.setattr(app_module, "SqlSessionStore", Recorded)
    return policies


async def test_a_policy_comes_from_code_or_else_from_the_environment(
    kind: str, made: list[RetentionPolicy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    Made(kind).app("sqlite:///sessions.db")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}IDLE", "30m")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}ABSOLUTE", "7d")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}PER_PRINCIPAL", "5")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TOMBSTONE", "")
    Made(kind).app("sqlite:///sessions.db")
    policy = RetentionPolicy(idle=HOUR)
    Made(kind).app("sqlite:///sessions.db", retention=policy)
    assert made == [
        RetentionPolicy(),
        RetentionPolicy(idle=timedelta(minutes=30), absolute=timedelta(days=7), per_principal=5),
        policy,
    ]


async def test_an_environment_that_makes_no_sense_is_refused_by_the_variables_name(
    made: list[RetentionPolicy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}IDLE", "soon")
    with pytest.raises(ConfigurationError, match=f"{ENVIRONMENT_PREFIX}IDLE.*soon"):
        Made("MCPServer").app("sqlite:///sessions.db")
    assert made == []


async def test_an_idle_timeout_and_an_idle_time_in_the_environment_are_too_much(
    kind: str, made: list[RetentionPolicy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}ABSOLUTE", "7d")
    Made(kind).app("sqlite:///sessions.db", session_idle_timeout=90)
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}IDLE", "30m")
    with pytest.raises(ConfigurationError, match="session_idle_timeout"):
        Made(kind).app("sqlite:///sessions.db", session_idle_timeout=90)
    assert len(made) == 2


async def test_a_policy_goes_to_the_store_that_is_given(kind: str, store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match="retention"):
        durable_app(Made(kind).server, store, retention=RetentionPolicy())


# Limits


@pytest.mark.parametrize("limit", ["per_principal", "anonymous"])
async def test_one_session_too_many_is_answered_503_without_an_id(
    store: FaultyStore, json_response: bool, limit: str, caplog: pytest.LogCaptureFixture
) -> None:
    if limit == "anonymous":
        store.retention, user = RetentionPolicy(anonymous=2), None
    else:
        store.retention, user = RetentionPolicy(per_principal=2, per_principal_excess="refuse"), principal("alice")
    async with instance(store, json_response=json_response) as one:
        clients = [one.client(user=user) for _ in range(2)]
        for client in clients:
            await client.begin()
        for _ in range(3):
            refused = await one.client(user=user).initialize()
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.session_id is None
        assert limit in caplog.text
        await until(lambda: not stopping_in(one.manager))
        assert one.residents == 2
        one.assert_seats_match()
        for client in clients:
            assert (await client.request("tools/list")).status == 200
        # Others are not limited by it.
        other = one.client(user=principal("bob"))
        await other.begin()
        if limit == "per_principal":
            assert (await clients[0].delete()).status == 200
            assert (await one.client(user=user).initialize()).status == 200
        else:
            # Its tombstone stays for a while.
            assert (await clients[0].delete()).status == 200
            assert (await one.client(user=user).initialize()).status == 503
            assert isinstance(store.inner, Sessions)
            store.inner.ahead += timedelta(minutes=2)
            assert (await one.client(user=user).initialize()).status == 200


async def test_a_limit_is_answered_as_a_full_memory_is(store: FaultyStore, json_response: bool) -> None:
    store.retention = RetentionPolicy(anonymous=0)
    async with instance(store, json_response=json_response) as one:
        limited = await one.client().initialize()
    async with instance(FaultyStore(), max_sessions=1, json_response=json_response) as one:
        client = one.client()
        await client.begin()
        await client.get_stream()
        full = await one.client().initialize()
    assert seen_by_a_client(limited) == seen_by_a_client(full)


async def test_one_session_too_many_ends_the_oldest_wherever_it_is(
    store: FaultyStore, other_store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(per_principal=2)
    ends: list[EndReason] = []

    async def on_end(_record: Any, reason: EndReason) -> None:
        ends.append(reason)

    alice = principal("alice")
    async with (
        instance(store, end_within=LONG, on_end=on_end) as one,
        instance(other_store, end_within=LONG) as two,
    ):
        oldest, used = one.client(user=alice), one.client(user=alice)
        for client in (used, oldest):
            await client.begin()
            clock.advance(timedelta(minutes=1))
        # Used again, and stored so: the other one is idle for longer.
        await used.request("tools/list")
        await activity_of(one.manager).report(everything=True)
        stream = await oldest.get_stream()
        newest = two.client(user=alice)
        await newest.begin()
        await stream.end()
        assert (await oldest.request("tools/list")).status == 404
        assert (await used.request("tools/list")).status == 200
        assert (await newest.request("tools/list")).status == 200
        await until(lambda: ends != [])
    assert ends == [EndReason.LIMIT]
