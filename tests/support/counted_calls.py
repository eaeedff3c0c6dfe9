"""A program that prints as JSON how many function calls of this package each operation takes, in a process of its own.

What other tests leave in theirs, such as a provider of OpenTelemetry, would count.
"""

import asyncio
import json
import logging

from benchmarks.calls import Profiler, count_calls
from benchmarks.contenders import EVENTS, JSON, OPERATIONS, SSE, ours

COUNTED = [("call", JSON), ("call", SSE), ("call", EVENTS), ("restart", JSON), ("restart", EVENTS), ("handshake", JSON)]


async def _counted() -> dict[str, float]:
    found = {}
    profiler = Profiler()
    with profiler.installed():
        for operation, mode in COUNTED:
            calls, _ = await count_calls(profiler, ours("ours", None), OPERATIONS[operation], mode, rounds=12)
            found[f"{operation}, {mode.name}"] = calls.by_owner["ours"]
    return found


logging.disable(logging.CRITICAL)
print(json.dumps(asyncio.run(_counted())))
