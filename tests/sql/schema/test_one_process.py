"""Several migrations at once within one process, whose Alembic is shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import ConfigurationError, SqlSessionStore
from mcp_session_store.sql.schema import migrate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def test_stores_that_make_first_contact_at_once_each_migrate_their_own_file(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path / name}" for name in ("1.db", "2.db", "3.db", "same.db", "same.db")]
    stores = [SqlSessionStore(url, timeout=60) for url in urls]
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for store in stores:
                tasks.start_soon(store.open)
    for store, url in zip(stores, urls, strict=True):
        await store.aclose()
        await migrate.check(url)


async def test_schemas_of_one_database_can_be_migrated_at_once(postgres_url: str) -> None:
    schemas = ["one", "two", "three"]

    async def upgrade(schema: str) -> None:
        await migrate.upgrade(postgres_url, schema=schema)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for schema in schemas:
                tasks.start_soon(upgrade, schema)
    for schema in schemas:
        await migrate.check(postgres_url, schema=schema)


@pytest.mark.parametrize("url", ["sqlite:///{}", "sqlite:///file:{}?uri=true"])
@pytest.mark.parametrize("look", [migrate.current, migrate.check])
async def test_looking_at_a_file_that_does_not_exist_does_not_make_it(tmp_path: Path, look: object, url: str) -> None:
    assert callable(look)
    path = tmp_path / "typo.db"
    with pytest.raises(ConfigurationError, match=r"there is no file .*typo\.db.*upgrade"):
        await look(url.format(path))
    assert not path.exists()
