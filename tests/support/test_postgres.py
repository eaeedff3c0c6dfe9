"""The way to a Postgres server: its order, its failure, and a server that stops and starts."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.support import postgres
from tests.support.postgres import NoPostgresError, PostgresServer, UnavailableError, execute, fresh_database

if TYPE_CHECKING:
    from pathlib import Path


def _unavailable(reason: str) -> str:
    raise UnavailableError(reason)


def _installation(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (folder / name).touch(mode=0o755)
    return folder


def test_the_first_way_that_works_is_taken_and_the_later_ones_are_not_tried() -> None:
    tried: list[str] = []

    def way(name: str) -> str:
        tried.append(name)
        return name if name != "first" else _unavailable("not here")

    ways = [(name, lambda name=name: way(name)) for name in ("first", "second", "third")]
    assert postgres._first(ways) == "second"
    assert tried == ["first", "second"]


def test_without_any_server_the_failure_lists_all_that_was_tried_with_the_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres, "given_server", lambda: _unavailable("variable not set"))
    monkeypatch.setattr(postgres, "container_server", lambda stack: _unavailable("no daemon"))
    monkeypatch.setattr(
        postgres,
        "BINARIES",
        [("on PATH", lambda: _unavailable("no initdb")), ("packaged", lambda: _unavailable("none"))],
    )
    with ExitStack() as stack, pytest.raises(NoPostgresError) as failure:
        postgres.provide_postgres(stack)
    lines = str(failure.value).splitlines()
    assert [line.strip() for line in lines if line.startswith("  ")] == [
        "the server named by TEST_POSTGRES_URL: variable not set",
        "a container (testcontainers): no daemon",
        "on PATH: no initdb",
        "packaged: none",
    ]
    assert "pip install '.[test]'" in lines[-1]


def test_a_given_server_that_does_not_answer_is_an_error_and_never_replaced_by_another() -> None:
    environment = {"TEST_POSTGRES_URL": "postgresql://somebody@127.0.0.1:1/postgres"}
    with pytest.raises(NoPostgresError, match="TEST_POSTGRES_URL is set, but that server does not answer"):
        postgres.given_server(environment)


def test_a_given_server_is_used_through_asyncpg_whatever_driver_its_url_names(
    postgres_server_url: str,
) -> None:
    environment = {"TEST_POSTGRES_URL": postgres_server_url.replace("postgresql+asyncpg", "postgresql")}
    assert postgres.given_server(environment) == postgres_server_url


def test_the_highest_version_of_the_distribution_is_taken(tmp_path: Path) -> None:
    for version in ("9.6", "15", "14"):
        _installation(tmp_path / version / "bin")
    (tmp_path / "17").mkdir()
    assert postgres.binaries_of_distribution(tmp_path) == tmp_path / "15" / "bin"


def test_binaries_on_the_path_are_found_through_links(tmp_path: Path) -> None:
    real = _installation(tmp_path / "postgresql" / "bin")
    links = tmp_path / "links"
    links.mkdir()
    (links / "initdb").symlink_to(real / "initdb")
    assert postgres.binaries_on_path(str(links)) == real


def test_an_installation_without_its_server_is_not_taken(tmp_path: Path) -> None:
    (_installation(tmp_path / "15" / "bin") / "postgres").unlink()
    with pytest.raises(UnavailableError, match="has no postgres"):
        postgres.binaries_of_distribution(tmp_path)


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(UnavailableError, match="extra 'test'"):
        postgres.binaries_of_package("no_such_package_anywhere")


def test_the_packaged_binaries_make_a_server_that_works() -> None:
    with PostgresServer(postgres.binaries_of_package()) as server:
        execute(server.url(), "SELECT 1")


def test_a_copy_of_the_packaged_binaries_runs_where_the_package_cannot_be_reached(tmp_path: Path) -> None:
    copy = postgres.copy_of(postgres.binaries_of_package(), tmp_path)
    assert copy.is_relative_to(tmp_path)
    for name in ("initdb", "postgres"):
        done = subprocess.run([copy / name, "--version"], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_each_fresh_database_is_empty_and_gone_afterwards_even_with_a_connection_left_open(
    postgres_server_url: str,
) -> None:
    with fresh_database(postgres_server_url) as url:
        execute(url, "CREATE TABLE kept (id int)")
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        execute(url, "SELECT 1")
    with fresh_database(postgres_server_url) as other:
        assert other != url
        execute(other, "CREATE TABLE kept (id int)")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_was_stopped_comes_back_on_its_port_with_its_data(
    stoppable_postgres: PostgresServer, mode: postgres.StopMode
) -> None:
    with stoppable_postgres.database() as url:
        execute(url, "CREATE TABLE kept (id int)")
        stoppable_postgres.stop(mode)
        with pytest.raises(ConnectionRefusedError):
            execute(url, "SELECT 1")
        stoppable_postgres.start()
        execute(url, "SELECT * FROM kept")
