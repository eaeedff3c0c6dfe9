"""Clients' streams that break and move between processes of which some are killed, without an event log.

`python -m benchmarks.stream_trial` makes the same trial at its full size, and with an event log, too.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.support.questions import serve_questions
from tests.support.stream_proxy import StreamProxy
from tests.support.stream_trial import STREAM_KINDS, StreamTrial
from tests.support.trial import Faults, meanwhile

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.servers import ServeFunction

pytestmark = pytest.mark.anyio


async def test_what_any_process_says_comes_once_and_in_order_though_streams_break_and_processes_are_killed(
    serve: ServeFunction, tmp_path: Path, store_url: str
) -> None:
    notes = tmp_path / "notes"
    servers = [serve_questions(serve, notes, store_url) for _ in range(3)]
    async with StreamProxy([server.port for server in servers], dice=random.Random(1)) as proxy:
        trial = StreamTrial(
            proxy,
            notes,
            random.Random(2),
            has_events=False,
            pause=0.6,
            cut_every=4.0,
            # On a busy machine a process may get no time for a while: less than the load balancer waits.
            lingers=[16.0],
            soon=3.0,
            closed_within=8.0,
        )
        kill = partial(Faults(trial, random.Random(3), longest_pause=2.0).kill, servers)
        async with meanwhile([kill, kill]):
            await trial.run(dict.fromkeys(STREAM_KINDS, 30), clients=8)
        tallies = await trial.tallies()
        shown = "\n".join([f"{tallies}", *trial.verdicts("lost"), *trial.verdicts("repeated")])
        for tally in tallies.values():
            assert (tally.lost, tally.repeated, tally.wrong) == (0, 0, 0), shown
            # Or next to nothing was tried.
            assert tally.arrived > tally.asked / 2, shown
            assert tally.elsewhere, shown
        assert trial.disordered() == 0
        assert trial.kept_open(by_killed=False) == []
        assert trial.cuts
        assert trial.killed
