"""What an instance holds: others see it from outside, its death releases it, and nothing else says that it is dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.mailbox import Presence
from mcp_session_store.sql import SqlMailbox
from mcp_session_store.sql.dialects.advisory_locks import LOCK_CLASS, lock_number
from mcp_session_store.sql.dialects.lock_files import STALE_AFTER, lock_folder
from tests.support.clients import until
from tests.support.databases import execute, migrated, settled
from tests.support.forking import ForkedProcess
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

HOLDERS = (
    f"SELECT pid, objid FROM pg_locks WHERE locktype = 'advisory' AND classid = {LOCK_CLASS} AND objsubid = 2 "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
LOOK = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
try:
    os.lockf(descriptor, os.F_TEST, 0)
except (BlockingIOError, PermissionError):
    sys.exit(7)
"""
"""Program of another process, which ends with 7 where a file is locked."""


def instance(name: str) -> str:
    return f"host:1:{name}"


@asynccontextmanager
async def listening(mailbox: SqlMailbox, name: str, *, holds: bool = True) -> AsyncIterator[asyncio.Task[None]]:
    """Meanwhile a mailbox listens for an instance."""
    held = asyncio.Event()
    task = asyncio.ensure_future(mailbox.listen(lambda: None, instance=instance(name), on_held=held.set))
    try:
        waiting = asyncio.ensure_future(held.wait())
        await asyncio.wait({waiting, task}, timeout=20 if holds else 1, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert not task.done()
        assert held.is_set() == holds
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[SqlMailbox]:
    async with SqlMailbox(url) as mailbox:
        yield mailbox
        await settled(mailbox)


async def epoch(url: str, mailbox: SqlMailbox, name: str, *, held: bool = True) -> str | None:
    """Send a heartbeat; return the epoch that it stores."""
    await mailbox.beat(Presence(instance=instance(name), held=held))
    ((epoch,),) = await execute(url, f"SELECT lock_epoch FROM mcp_session_instance WHERE name = '{name}'")
    assert epoch is None or isinstance(epoch, str)
    return epoch


async def is_released(mailbox: SqlMailbox, name: str) -> bool:
    return (await mailbox.last_beats([name]))[name].released


async def test_a_heartbeat_stores_that_something_is_held_only_while_it_is(migrated_url: str) -> None:
    name = uuid.uuid4().hex
    async with opened(migrated_url) as mailbox, opened(migrated_url) as other:
        assert await epoch(migrated_url, mailbox, name) is None
        async with listening(mailbox, name):
            held_in = await epoch(migrated_url, mailbox, name)
            assert held_in is not None
            assert not await is_released(other, name)
            # Another mailbox of this process does not hold it, whatever is locked.
            assert await epoch(migrated_url, other, name) is None
            assert await epoch(migrated_url, mailbox, name, held=False) is None
            assert await epoch(migrated_url, mailbox, name) == held_in
        assert await epoch(migrated_url, mailbox, name) is None


async def test_the_death_of_a_process_releases_what_it_held(migrated_url: str, tmp_path: Path) -> None:
    name = uuid.uuid4().hex
    # On Postgres a child that was forked keeps the connection, and the heartbeat decides.
    child = ["child"] if migrated_url.startswith("sqlite") else []
    log_file = tmp_path / "log"
    with log_file.open("ab") as out:
        process = ForkedProcess(
            "tests.support.holding",
            [migrated_url, instance(name), *child],
            cwd=ROOT,
            env=os.environ,
            stdout=out.fileno(),
            stderr=out.fileno(),
        )
    try:
        await until(lambda: "holds" in log_file.read_text(), "the process holds its lock")
        async with opened(migrated_url) as mailbox:
            assert not await is_released(mailbox, name)
            os.kill(process.pid, signal.SIGSTOP)
            assert not await is_released(mailbox, name)
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: is_released(mailbox, name), "its lock is free")
            # That of another server, or of another machine, says nothing.
            await execute(migrated_url, f"UPDATE mcp_session_instance SET lock_epoch = '1' WHERE name = '{name}'")
            assert not await is_released(mailbox, name)
            # An older version stores none.
            await execute(migrated_url, f"UPDATE mcp_session_instance SET lock_epoch = NULL WHERE name = '{name}'")
            assert not await is_released(mailbox, name)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait, 20)


async def test_an_instance_whose_connection_is_cut_says_with_its_next_heartbeat_that_it_holds_nothing(
    postgres_url: str,
) -> None:
    await migrated(postgres_url)
    name = uuid.uuid4().hex
    async with opened(postgres_url) as mailbox, opened(postgres_url) as other:
        async with listening(mailbox, name) as task:
            assert await epoch(postgres_url, mailbox, name) is not None
            (holder,) = await execute(postgres_url, HOLDERS)
            assert holder.objid == lock_number(name)
            await execute(postgres_url, f"SELECT pg_terminate_backend({holder.pid}, 10000)")
            await asyncio.wait({task}, timeout=20)
            assert task.done()
        assert await is_released(other, name)
        assert await epoch(postgres_url, mailbox, name) is None
        assert not await is_released(other, name)
        # It takes the lock again.
        async with listening(mailbox, name):
            assert await epoch(postgres_url, mailbox, name) is not None
            assert not await is_released(other, name)


async def test_a_lock_that_an_application_has_taken_is_left_to_it(postgres_url: str) -> None:
    await migrated(postgres_url)
    name = uuid.uuid4().hex
    number = lock_number(name) - (2**32 if lock_number(name) >= 2**31 else 0)
    application = await asyncpg.connect(make_url(postgres_url).set(drivername="postgresql").render_as_string(False))
    try:
        await application.execute(f"SELECT pg_advisory_lock({LOCK_CLASS}, {number})")
        async with opened(postgres_url) as mailbox, listening(mailbox, name, holds=False):
            assert await epoch(postgres_url, mailbox, name) is None
    finally:
        await application.close()


async def test_two_instances_of_one_process_keep_their_locks_while_they_look_at_each_other(sqlite_url: str) -> None:
    await migrated(sqlite_url)
    names = [uuid.uuid4().hex for _ in range(2)]
    folder = lock_folder(str(make_url(sqlite_url).database))
    async with opened(sqlite_url) as one, opened(sqlite_url) as two:
        async with listening(one, names[0]), listening(two, names[1]):
            for mailbox, name in zip((one, two), names, strict=True):
                assert await epoch(sqlite_url, mailbox, name) is not None
            for mailbox in (one, two):
                assert [beat.released for beat in (await mailbox.last_beats(names)).values()] == [False, False]
            for name in names:
                process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", LOOK, folder / name)
                assert await process.wait() == 7
        assert not folder.exists()


async def test_the_files_of_instances_that_died_long_ago_are_removed(sqlite_url: str) -> None:
    await migrated(sqlite_url)
    folder = lock_folder(str(make_url(sqlite_url).database))
    folder.mkdir()
    old, young, not_ours = (folder / name for name in ("old", "young", "not.ours"))
    for path in (old, young, not_ours):
        path.touch()
    for path in (old, not_ours):
        long_ago = time.time() - STALE_AFTER - 1
        os.utime(path, (long_ago, long_ago))
    async with opened(sqlite_url) as mailbox, listening(mailbox, "mine"):
        assert {path.name for path in folder.iterdir()} == {"young", "not.ours", "mine"}
        # A file that is held is as old as the last heartbeat.
        os.utime(folder / "mine", (long_ago, long_ago))
        assert await epoch(sqlite_url, mailbox, "mine") is not None
        assert time.time() - (folder / "mine").stat().st_mtime < 60
        # Where others cannot see it, it says nothing.
        (folder / "mine").unlink()
        assert await epoch(sqlite_url, mailbox, "mine") is None
    assert {path.name for path in folder.iterdir()} == {"young", "not.ours"}


@pytest.mark.parametrize("name", ["mine", "../mine", "a name"])
async def test_what_cannot_be_locked_is_left_to_the_heartbeat(sqlite_url: str, name: str) -> None:
    await migrated(sqlite_url)
    folder = lock_folder(str(make_url(sqlite_url).database))
    if name == "mine":
        folder.touch()  # not a folder
    async with opened(sqlite_url) as mailbox, listening(mailbox, name, holds=False):
        assert await epoch(sqlite_url, mailbox, name) is None
        # Of a file that is not there nothing can be said.
        statement = f"UPDATE mcp_session_instance SET lock_epoch = 'here' WHERE name = '{name}'"
        await execute(sqlite_url, statement)
        assert not await is_released(mailbox, name)
    assert folder.is_file() == (name == "mine")
