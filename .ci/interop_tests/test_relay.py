"""What clients of other languages send reaches the process that waits for it, and so it does through PgBouncer."""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.support.clients import until
from tests.support.proxy import RoundRobinProxy
from tests.support.questions import STEPS, Notes, serve_questions
from tests.support.trial import KINDS, Trial

if TYPE_CHECKING:
    from tests.support.servers import ServeFunction

pytestmark = pytest.mark.anyio

PROGRAM = Path(os.environ["INTEROP_CLIENTS"]) / "typescript" / "answering.mjs"
EACH = 20


async def test_answers_of_the_typescript_client_arrive(serve: ServeFunction, tmp_path: Path, migrated_url: str) -> None:
    servers = [serve_questions(serve, tmp_path / "notes", migrated_url) for _ in range(3)]
    notes = Notes(tmp_path / "notes")
    tokens = [f"{kind}-{secrets.token_hex(8)}" for kind in KINDS for _ in range(EACH)]
    outcomes: dict[str, str] = {}
    async with (
        RoundRobinProxy([server.port for server in servers], dice=random.Random(1)) as proxy,
        await anyio.open_process(["node", str(PROGRAM), proxy.mcp_url], stderr=None) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        assert (await lines.receive_until(b"\n", 10_000)).startswith(b"session ")
        for token in tokens:
            kind = token.partition("-")[0]
            await process.stdin.send(f"{'sample' if kind == 'error' else kind} {token}\n".encode())
            with anyio.fail_after(30):
                outcomes[token] = (await lines.receive_until(b"\n", 10_000)).decode()
        cancelled = [token for token in tokens if token.startswith("wait")]
        await until(
            lambda: all(notes.of(token)[-1].what == "cancelled" for token in cancelled), "all calls are cancelled"
        )
        await process.stdin.aclose()
    for token, outcome in outcomes.items():
        if token.startswith("wait"):
            assert outcome == "cancelled"
        elif token.startswith("error"):
            # As its client words it.
            assert token in outcome
        else:
            assert outcome == f"typescript {token}"
        if token.startswith("progress"):
            # In any order, because between two senders there is none.
            progress = sorted(note.value for note in notes.of(token) if note.what == "progress")
            assert progress == [f"{step} {token}" for step in STEPS]


async def test_answers_and_cancellations_arrive_through_pgbouncer(
    serve: ServeFunction, tmp_path: Path, migrated_url: str
) -> None:
    servers = [serve_questions(serve, tmp_path / "notes", migrated_url, events=True) for _ in range(3)]
    async with RoundRobinProxy([server.port for server in servers], dice=random.Random(1)) as proxy:
        trial = Trial(proxy.mcp_url, tmp_path / "notes", random.Random(2), patience=25.0)
        await trial.run(dict.fromkeys(KINDS, EACH), clients=10, client_kinds=("official", "fastmcp"))
        tallies = await trial.tallies(within=5.0)
        assert {kind: tally.arrived for kind, tally in tallies.items()} == dict.fromkeys(KINDS, EACH), tallies
        assert all(tally.elsewhere for tally in tallies.values())
