"""Readiness: a final cause that appears later ends nothing, and each trouble has one line when it begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.adapter.readiness import State
from mcp_session_store.errors import SchemaBehind, StoreBusy, StoreMisconfigured, StoreUnavailable
from mcp_session_store.sql import SqlSessionStore
from tests.support.asgi import PATIENCE, until
from tests.support.http import assert_unavailable
from tests.support.instances import instance
from tests.support.roles import limited

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore
    from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.anyio

SOON = 0.1
"""The store is polled 20 times a second."""


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What the log holds of this package's warnings and worse since it was last asked: level and text."""
    ours = [record for record in caplog.records if record.name.startswith("mcp_session_store")]
    found = [(record.levelname, record.getMessage()) for record in ours if record.levelno >= 30]
    caplog.clear()
    return found


@pytest.mark.parametrize("error", [StoreUnavailable("refused"), StoreBusy("too many")])
async def test_a_passing_cause_at_the_start_has_one_line_and_one_when_it_is_over(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    store.failing(error)
    async with instance(store, outage_patience=5, end_within=SOON) as one:
        assert one.manager.readiness.state is State.STARTING
        await anyio.sleep(0.5)
        begin = ("WARNING", f"the session store is away, and requests that need it wait until it is back: {error}")
        if isinstance(error, StoreUnavailable):
            assert lines(caplog) == [begin]
        else:
            assert begin in lines(caplog)
        store.up()
        await until(lambda: one.manager.readiness.state is State.READY)
        ((level, text),) = lines(caplog)
        assert level == "WARNING"
        assert text.startswith("the session store is back after ")
    stopped: State = one.manager.readiness.state
    assert stopped is State.STOPPING


@pytest.mark.parametrize("error", [StoreMisconfigured("wrong password"), SchemaBehind("behind")])
async def test_a_final_cause_that_appears_later_ends_nothing_and_goes_when_it_is_repaired(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    async with instance(store, outage_patience=20, end_within=SOON) as one:
        resident = one.client()
        await resident.handshake()
        assert one.manager.readiness.state is State.READY
        store.down()
        await until(lambda: one.manager.readiness.state is State.DEGRADED)
        lines(caplog)
        store.failing(error)
        await until(lambda: one.manager.readiness.state is State.NOT_READY)
        await anyio.sleep(0.5)
        ((level, text),) = lines(caplog)
        assert level == "ERROR"
        assert text.endswith(f": {error}")
        assert (await resident.ping()).status == 200
        async with anyio.create_task_group() as group:
            if isinstance(error, SchemaBehind):
                with anyio.fail_after(PATIENCE):
                    assert_unavailable(await one.client().initialize())
            else:
                group.start_soon(one.client().handshake)
                await anyio.sleep(0.3)
            caplog.clear()
            store.up()
        await until(lambda: one.manager.readiness.state is State.READY)
        ((level, text),) = lines(caplog)
        assert text.startswith("the session store can be used again after ")
        await one.client().handshake()


async def test_a_final_cause_that_comes_and_goes_is_logged_once(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store, end_within=SOON) as one:
        for _ in range(3):
            store.failing(StoreMisconfigured("wrong password"))
            await until(lambda: one.manager.readiness.state is State.NOT_READY)
            store.up()
            await until(lambda: one.manager.readiness.state is State.READY)
        assert [level for level, _ in lines(caplog)] == ["ERROR", "WARNING"]


async def test_an_instance_goes_on_when_the_database_lets_its_user_in_again(
    stoppable_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    with stoppable_postgres.database() as url:
        async with limited(url, limit=20) as of_role:
            role = str(make_url(of_role).username)
            async with (
                SqlSessionStore(of_role) as store,
                instance(store, outage_patience=20, end_within=5) as one,
            ):
                resident = one.client()
                await resident.handshake()
                caplog.clear()
                with stoppable_postgres.barring(role):
                    await until(lambda: one.manager.readiness.state is State.NOT_READY)
                    await anyio.sleep(0.3)
                    errors = [text for level, text in lines(caplog) if level == "ERROR"]
                    assert len(errors) == 1
                    assert "an entry to the server's pg_hba.conf" in errors[0]
                    assert (await resident.ping()).status == 200
                    async with anyio.create_task_group() as group:
                        group.start_soon(one.client().handshake)
                        await anyio.sleep(0.3)
                        group.cancel_scope.cancel()
                await until(lambda: one.manager.readiness.state is State.READY)
                assert [level for level, text in lines(caplog) if "can be used again after" in text] == ["WARNING"]
                await one.client().handshake()
