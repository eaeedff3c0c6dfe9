"""Alembic without its line for each step at INFO, which the first start of a server would begin its log with."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_steps_in_log"]

_LOGGERS: Final = ("alembic.runtime.migration", "alembic.runtime.plugins")


@contextlib.contextmanager
def without_steps_in_log() -> Iterator[None]:
    """Leave out of the log what Alembic says at INFO in this thread; no logger is configured."""
    thread = threading.get_ident()

    def is_kept(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or record.thread != thread

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(is_kept)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_kept)
