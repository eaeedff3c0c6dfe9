"""The application of the process tests, served from processes, and their notes in files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.application import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.support.servers import ServeFunction, ServerProcess


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """One message of a handshake, as the application's middleware saw it."""

    method: str
    pid: int
    replayed_in: str | None
    """The session that was being restored; `None` for a client's own handshake."""


class Application:
    """The application of `tests.support.application`, and the notes of its processes in files.

    Args:
        serve: The fixture `serve`.
        folder: Folder of the files.
    """

    def __init__(self, serve: ServeFunction, folder: Path) -> None:
        self.gate = folder / "gate"
        """While this file exists, a replayed `initialize` waits in the application's middleware."""
        self.calls_gate = folder / "calls-gate"
        """While this file exists, calls of the tool `wait` go on."""
        self._said = folder / "said"
        self._said.mkdir()
        self._serve = serve
        self._servers: list[ServerProcess] = []
        self._handshakes = folder / "handshakes.jsonl"

    def serve(
        self,
        url: str,
        app: str = "mcpserver",
        *,
        workers: int = 1,
        auto_upgrade: bool = False,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        clock_ahead: float = 0.0,
        **arguments: Any,
    ) -> ServerProcess:
        """Start a server process with the app that a factory makes, on a database.

        Args:
            url: The database.
            app: The factory, of `tests.support.application` unless a module is named.
            workers: uvicorn's.
            auto_upgrade: Of `durable_app`.
            options: uvicorn's.
            environment: More variables.
            clock_ahead: Seconds by which the clock of the process is wrong.
            arguments: More of `durable_app`'s.
        """
        settings = Settings(
            url=url,
            handshakes=str(self._handshakes),
            gate=str(self.gate),
            calls_gate=str(self.calls_gate),
            said=str(self._said),
            auto_upgrade=auto_upgrade,
            options=arguments,
            clock_ahead=clock_ahead,
        )
        server = self._serve(
            app if ":" in app else f"tests.support.application:{app}",
            environment={**settings.environment, **(environment or {})},
            workers=workers,
            # Requests are many, and a failure shows only the end of the log.
            options=["--factory", "--no-access-log", *options],
        )
        self._servers.append(server)
        return server

    def hold(self, call: str) -> None:
        """Hold a call of the tool `talk`, until `let_say` and `release`."""
        (self._said / call).touch()

    def let_say(self, call: str, things: int = 1) -> None:
        """Let a held call say so many more things; its result is one of them."""
        with (self._said / call).open("ab") as file:
            file.write(b"." * things)

    def release(self, call: str) -> None:
        """Let a held call say all the rest."""
        (self._said / call).unlink()

    def runs(self, call: str) -> int:
        """Return how many times a call of `talk` has begun to run, in all processes together."""
        return self.noted(replayed=False).count(f"talk {call}")

    def is_over(self, call: str) -> bool:
        """Return whether a call of `talk` has said all but its result."""
        return f"talked {call}" in self.noted(replayed=False)

    def handshakes(self, method: str = "initialize", *, replayed: bool) -> list[Handshake]:
        """Return the messages that the processes saw, over all restarts: the clients' own, or the replayed ones."""
        return [one for one in self._seen() if one.method == method and (one.replayed_in is not None) == replayed]

    def noted(self, *, replayed: bool) -> list[str]:
        """Return the methods of all notes, in order."""
        return [one.method for one in self._seen() if (one.replayed_in is not None) == replayed]

    def _seen(self) -> list[Handshake]:
        if not self._handshakes.exists():
            return []
        return [Handshake(**json.loads(line)) for line in self._handshakes.read_bytes().splitlines()]

    def check_logs(self) -> None:
        """Check that the logs of the servers hold no traceback and no session id, whatever happened to the servers."""
        ids = {one.replayed_in for one in self.handshakes(replayed=True)}
        secrets = {session_id for session_id in ids if session_id is not None}
        for server in self._servers:
            log = server.log()
            assert "Traceback" not in log
            assert [secret for secret in secrets if secret in log] == []
