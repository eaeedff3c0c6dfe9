"""The clock by which the use and the life of sessions are timed."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["now"]

# Not anyio's, which looks up its backend at each call, because each request asks for the time thrice. On Linux one that
# goes on while the host is suspended: sessions grow older, and may end elsewhere, meanwhile.
now: Final[Callable[[], float]] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic
)
