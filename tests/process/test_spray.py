"""Somebody guesses session ids."""

from __future__ import annotations

import secrets
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from tests.support.clients import sessions, until, whoami
from tests.support.databases import migrated
from tests.support.http import RawClient
from tests.support.records import Records

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio

REQUESTS = 2000
AT_ONCE = 50


async def test_a_spray_of_random_session_ids_neither_fills_memory_nor_exhausts_the_pool(
    application: Application, postgres_url: str
) -> None:
    await migrated(postgres_url)
    records = Records(postgres_url)
    server = application.serve(postgres_url)
    statuses: Counter[int] = Counter()
    connections: set[int] = set()
    resident_calls = 0
    ids = iter([secrets.token_hex(16) for _ in range(REQUESTS)])
    sprayed = anyio.Event()

    http = httpx2.AsyncClient(timeout=60, trust_env=False, verify=False)
    async with sessions(server.mcp_url, 1) as (resident,), http:

        async def bookkeeping() -> object:
            return (await http.get(f"{server.url}/bookkeeping")).json()

        async def spray() -> None:
            async with RawClient(server.mcp_url) as client:
                for number, client.session_id in enumerate(ids):
                    if number % 3 == 2:
                        answer = await client.delete()
                    elif number % 3 == 1:
                        answer = await client.get()
                    else:
                        answer = await client.call_tool("whoami")
                    statuses[answer.status] += 1

        async def count_connections() -> None:
            while not sprayed.is_set():
                connections.add(await records.connections())

        async def call() -> None:
            nonlocal resident_calls
            while not sprayed.is_set():
                assert (await whoami(resident))["restores"] == 0
                resident_calls += 1

        async def first_activity_is_reported() -> bool:
            row = await records.row(resident.session_id)
            return bool(row["expires_at"] - row["created_at"] > timedelta(hours=23))

        await whoami(resident)
        await until(first_activity_is_reported, "nothing is under way before the spray")
        before = await bookkeeping()
        async with anyio.create_task_group() as watching:
            watching.start_soon(count_connections)
            watching.start_soon(call)
            async with anyio.create_task_group() as spraying:
                for _ in range(AT_ONCE):
                    spraying.start_soon(spray)
            sprayed.set()

        assert statuses == {404: REQUESTS}
        assert resident_calls > 5
        # One for each kind of operation at most, however many ids are asked for at once.
        assert max(connections) <= 4

        async def is_as_before() -> bool:
            return await bookkeeping() == before

        await until(is_as_before, "nothing is left of the spray in memory")
        assert await records.count() == 1
    assert application.handshakes(replayed=True) == []
