"""The file of a SQLite database: made for its owner alone, and watched while it is open."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store.errors import SchemaMissing, StoreUnavailable
from mcp_session_store.records import EndReason
from mcp_session_store.sql import SqlMailbox, SqlSessionStore
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.transaction import transaction
from mcp_session_store.testing import new_session
from tests.support.databases import settled
from tests.support.internals import database_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some folder" / "sessions.db"


@pytest.fixture
async def store(file: Path) -> AsyncIterator[SqlSessionStore]:
    file.parent.mkdir()
    async with SqlSessionStore(f"sqlite:///{file}", timeout=20) as store:
        yield store


async def _stored(store: SqlSessionStore) -> UUID:
    session = new_session()
    await store.create(session)
    await settled(store)
    return session.key


async def _knows(store: SqlSessionStore, key: UUID) -> bool:
    return await store.load(key) is not None


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def _backup(file: Path, target: Path) -> None:
    with sqlite3.connect(file) as source, sqlite3.connect(target) as copy:
        source.backup(copy)
    source.close()
    copy.close()


def _permissions(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): stat.filemode(path.stat().st_mode)[1:] for path in folder.rglob("*")}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277])
@pytest.mark.parametrize("uri", ["sqlite:///{}", "sqlite:///file:{}?uri=true"])
async def test_a_new_file_is_its_owners_alone_and_so_is_what_stands_beside_it(
    tmp_path: Path, mask: int, uri: str
) -> None:
    with _umask(mask):
        async with SqlSessionStore(uri.format(tmp_path / "sessions.db")) as store, SqlMailbox(store) as mailbox:
            await _stored(store)
            held = asyncio.Event()
            listening = asyncio.create_task(
                mailbox.listen(lambda: None, instance="host:1:0123456789ab", on_held=held.set)
            )
            await held.wait()
            assert _permissions(tmp_path) == {
                "sessions.db": "rw-------",
                "sessions.db-wal": "rw-------",
                "sessions.db-shm": "rw-------",
                "sessions.db-instances": "rwx------",
                "sessions.db-instances/0123456789ab": "rw-------",
            }
            listening.cancel()


async def test_a_migration_makes_the_file_for_its_owner_alone(tmp_path: Path) -> None:
    with _umask(0):
        await migrate.upgrade(f"sqlite:///{tmp_path / 'sessions.db'}")
    assert _permissions(tmp_path) == {"sessions.db": "rw-------"}


async def test_a_new_file_is_made_where_a_link_points(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "sessions.db").symlink_to(tmp_path / "volume" / "data.db")
    with _umask(0):
        async with SqlSessionStore(f"sqlite:///{tmp_path / 'sessions.db'}", timeout=20) as store:
            key = await _stored(store)
            assert set(_permissions(tmp_path / "volume").values()) == {"rw-------"}
            (tmp_path / "volume" / "data.db").rename(tmp_path / "kept.db")
            with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
                await store.load(key)
            (tmp_path / "kept.db").rename(tmp_path / "volume" / "data.db")
            assert await _knows(store, key)


async def test_the_permissions_of_a_file_that_exists_are_left_and_hold_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "sessions.db"
    file.touch()
    file.chmod(0o640)
    async with SqlSessionStore(f"sqlite:///{file}") as store:
        await _stored(store)
        assert set(_permissions(tmp_path).values()) == {"rw-r-----"}


async def test_a_file_that_was_deleted_is_away_until_it_is_put_back(
    store: SqlSessionStore, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = await _stored(store)
    kept = tmp_path / "kept.db"
    file.rename(kept)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"sessions\.db'.* was deleted or replaced .* put it or a backup"):
            await store.load(key)
        with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
            await store.create(new_session())
    # Else the write-ahead log would be taken for that of the next file.
    assert list(file.parent.iterdir()) == []
    shutil.copyfile(kept, file)
    assert await _knows(store, key)
    await _stored(store)
    said = [record.message for record in caplog.records if "sessions.db" in record.message]
    assert len([text for text in said if "is used from now on" in text]) == 1


async def test_a_file_whose_folder_is_gone_is_away_until_that_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    async with SqlSessionStore(f"sqlite:///{folder / 'sessions.db'}", timeout=20) as store:
        key = await _stored(store)
        folder.rename(tmp_path / "elsewhere")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
                await store.load(key)
        (tmp_path / "elsewhere").rename(folder)
        assert await _knows(store, key)


async def test_a_file_that_was_replaced_serves_what_it_holds_and_nothing_else(
    store: SqlSessionStore, file: Path, tmp_path: Path
) -> None:
    before = await _stored(store)
    _backup(file, tmp_path / "backup.db")
    after = await _stored(store)
    (tmp_path / "backup.db").replace(file)
    assert await _knows(store, before)
    assert not await _knows(store, after)
    assert await store.end(before, reason=EndReason.CLIENT)
    await settled(store)
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("gone", [["-wal"], ["-shm"], ["-wal", "-shm"]])
async def test_without_its_write_ahead_log_a_file_has_all_that_was_committed(
    store: SqlSessionStore, file: Path, gone: list[str]
) -> None:
    keys = [await _stored(store) for _ in range(3)]
    for suffix in gone:
        Path(f"{file}{suffix}").unlink()
    for key in keys:
        assert await _knows(store, key)
    keys.append(await _stored(store))
    await store.aclose()
    async with SqlSessionStore(f"sqlite:///{file}") as other:
        for key in keys:
            assert await _knows(other, key)


async def test_a_store_that_is_closed_first_leaves_all_in_a_file_that_was_moved(
    store: SqlSessionStore, file: Path, tmp_path: Path
) -> None:
    key = await _stored(store)
    file.rename(tmp_path / "kept.db")
    await store.aclose()
    assert list(file.parent.iterdir()) == []  # or the log would be taken for that of the next file
    async with SqlSessionStore(f"sqlite:///{tmp_path / 'kept.db'}") as other:
        assert await _knows(other, key)


async def test_a_caller_that_leaves_while_a_lost_file_is_left_takes_no_connection_along(
    store: SqlSessionStore, file: Path, tmp_path: Path
) -> None:
    await _stored(store)
    database = database_of(store)
    assert database.file is not None
    with database.file.lock:  # which to leave the file waits for
        file.rename(tmp_path / "kept.db")
        connecting = asyncio.create_task(database.connect())
        await asyncio.sleep(0.1)
        connecting.cancel()
        await asyncio.wait({connecting}, timeout=0.1)
    with pytest.raises(asyncio.CancelledError):
        await connecting
    await settled(store)


@pytest.mark.parametrize("by_driver", [True, False])
async def test_nothing_is_committed_to_a_file_that_was_deleted_meanwhile(
    store: SqlSessionStore, file: Path, tmp_path: Path, by_driver: bool
) -> None:
    await _stored(store)
    database = database_of(store)
    insert = "UPDATE mcp_session SET client_name = 'late'"

    async def write(attempt: Attempt) -> None:
        def steps() -> Any:
            yield database.dialect.precompiled(sa.text(insert)), {}
            file.rename(tmp_path / "kept.db")
            return None

        if by_driver:
            await database.dialect.run(attempt.connection, steps(), writes=True, atomic=True)
            return
        async with transaction(attempt.connection, database.dialect):
            await attempt.connection.exec_driver_sql(insert)
            file.rename(tmp_path / "kept.db")

    async with database.lease(writes=True) as lease:
        with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
            await lease.run(write)
    with sqlite3.connect(tmp_path / "kept.db") as connection:
        assert connection.execute("SELECT count(*) FROM mcp_session WHERE client_name = 'late'").fetchone() == (0,)
    connection.close()


async def test_an_empty_file_in_its_place_is_not_taken_for_a_new_database(
    store: SqlSessionStore, file: Path, tmp_path: Path
) -> None:
    key = await _stored(store)
    _backup(file, tmp_path / "backup.db")
    file.unlink()
    file.touch()  # as a copy begins
    with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
        await store.load(key)
    assert file.stat().st_size == 0
    file.write_bytes((tmp_path / "backup.db").read_bytes())
    assert await _knows(store, key)


async def test_another_database_in_its_place_is_not_migrated(store: SqlSessionStore, file: Path) -> None:
    key = await _stored(store)
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE notes (note TEXT)")
    connection.close()
    with pytest.raises(SchemaMissing, match="mcp-session-store upgrade"):
        await store.load(key)


async def test_a_file_that_was_deleted_beneath_a_given_engine_is_away_as_well(tmp_path: Path) -> None:
    file = tmp_path / "sessions.db"
    await migrate.upgrade(f"sqlite:///{file}")
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    async with SqlSessionStore(engine) as store:
        key = await _stored(store)
        file.rename(tmp_path / "kept.db")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="was deleted or replaced"):
                await store.load(key)
        assert not file.exists()
        (tmp_path / "kept.db").rename(file)
        assert await _knows(store, key)
    await engine.dispose()


async def test_a_name_of_a_given_engine_that_only_looks_like_a_uri_is_that_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Without the option uri SQLAlchemy takes the whole for a name.
    engine = create_async_engine("sqlite+aiosqlite:///file:sessions.db")
    async with SqlSessionStore(engine) as store:
        key = await _stored(store)
        assert await _knows(store, key)
        assert database_of(store).shown_url == f"sqlite:///{quote(str(tmp_path))}/file%3Asessions.db"
        assert (tmp_path / "file:sessions.db").exists()
        await settled(store)
        (tmp_path / "file:sessions.db").unlink()
        with pytest.raises(StoreUnavailable, match=r"/file:sessions\.db', or its"):
            await store.load(key)
    await engine.dispose()


async def test_a_store_that_is_opened_again_may_make_its_file(store: SqlSessionStore, file: Path) -> None:
    await store.aclose()
    file.unlink()
    await store.open()
    assert not await _knows(store, uuid.uuid4())
