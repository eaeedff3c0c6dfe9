"""The blocks of README.md and docs/: those of Python run, one after the other, and the commands in others are there."""

from __future__ import annotations

import gc
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

import anyio
import click
import pytest

from mcp_session_store.cli import main
from tests.support.pages import PAGES, ROOT, blocks_of
from tests.support.serving import served

if TYPE_CHECKING:
    from pathlib import Path


RUN = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks_of(page)]
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN)
async def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    known: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks_of(page):
        if ADDRESS in block:
            # The program of a client, for the server that the blocks before it make.
            async with served(known["app"]) as address:
                program = [sys.executable, "-c", block.replace(ADDRESS, address)]
                done = await anyio.run_process(program, input=b"\n", check=False)
                assert done.returncode == 0, done.stderr.decode()
                assert b"at home" in done.stdout
        else:
            exec(compile(block, f"{page.name}:{line}", "exec", dont_inherit=True), known)


def commands_of(page: Path) -> list[str]:
    """Return the commands of this package in the shell blocks of a page."""
    shell = "".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    return re.findall(r"^mcp-session-store .*$", shell, re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if commands_of(page)])
def test_the_commands_of_a_page_are_there_with_their_options(page: Path) -> None:
    for line in commands_of(page):
        _, *words = shlex.split(line, comments=True)
        command: click.Command = main
        while isinstance(command, click.Group):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} - options == set(), line
