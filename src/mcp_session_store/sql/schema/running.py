"""One run of Alembic: its settings, its errors, and what it leaves behind in its own modules."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql.engine import shown_command
from mcp_session_store.sql.schema.quiet import without_steps_in_log

with without_steps_in_log():
    import alembic.context
    import alembic.op
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import URL

__all__ = [
    "ADVICE",
    "ALEMBIC",
    "CONNECTION",
    "DATABASE",
    "JOINS",
    "SCHEMA",
    "alembic_config",
    "command",
    "migrations_folder",
    "run_alembic",
]

ALEMBIC: Final = threading.Lock()
"""Lock around Alembic, which works on globals of its modules: two migrations at once would mix up their databases."""

# What `env.py` and the migrations find in the attributes of the settings.
CONNECTION: Final = "connection"
SCHEMA: Final = "schema"
DATABASE: Final = "url"
ADVICE: Final = "advice"
JOINS: Final = "joins"


def migrations_folder() -> Path:
    """Return the folder of the migrations: in the installed package, or at the root of the checkout it runs from."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "migrations", here.parents[4] / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise ConfigurationError("the migrations are missing from this installation; install mcp-session-store again")


def alembic_config(attributes: dict[str, Any], output: io.StringIO | None = None) -> Config:
    """Return the settings of a run.

    Args:
        attributes: What `env.py` finds in them.
        output: Where SQL is printed to, if it is not run.
    """
    config = Config(output_buffer=output) if output is not None else Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes.update(attributes)
    return config


def run_alembic(run: Callable[[Config], None], config: Config, url: URL, schema: str | None) -> None:
    """Run a command of Alembic, under its lock.

    Args:
        run: Runs the command.
        config: Its settings.
        url: URL of the database, for the advice in errors.
        schema: Schema with the tables.

    Raises:
        ConfigurationError: The command cannot run; the message says why.
    """
    try:
        with _modules_as_before(), without_steps_in_log():
            run(config)
    except CommandError as error:
        advice = shown_command("current", url, schema)
        raise ConfigurationError(f"the migration cannot run: {error}; to see the revision, {advice}") from error


@contextlib.contextmanager
def _modules_as_before() -> Iterator[None]:
    """Give Alembic's modules back to the run of an application that a migration of ours is part of.

    They stand for one run at a time, and after an inner one for none: the outer one would fail.
    """
    before = [(vars(module), dict(vars(module))) for module in (alembic.context, alembic.op)]
    try:
        yield
    finally:
        for names, values in before:
            names.update(values)
