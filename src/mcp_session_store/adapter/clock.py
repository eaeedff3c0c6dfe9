"""The clock by which the use and the life of sessions are timed."""

from __future__ import annotations

import time

__all__ = ["now"]

# Not anyio's, which looks up its backend at each call, because each request asks for the time thrice.
now = time.monotonic
