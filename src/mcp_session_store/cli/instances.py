"""The command that lists the instances of a namespace."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from mcp_session_store.cli.options import json_option, run
from mcp_session_store.cli.output import Column, number, print_json, print_table, span
from mcp_session_store.cli.target import target_options
from mcp_session_store.settings import InstanceSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_session_store.cli.target import Target
    from mcp_session_store.mailbox import RunningInstance

__all__ = ["instances"]

_COLUMNS: Final = (
    Column(title="INSTANCE", width=20, flexible=True),
    Column(title="STATE", width=6),
    Column(title="LAST HEARD OF", width=13),
    Column(title="SINCE (UTC)", width=19, rank=3),
    Column(title="SERVER", width=8, flexible=True, rank=1),
    Column(title="VERSION", width=7, rank=4),
    Column(title="NUMBER", width=8, right=True, rank=5),
    Column(title="SESSIONS", width=8, right=True),
    Column(title="STREAMS", width=7, right=True, rank=2),
    Column(title="WAITING", width=7, right=True),
)

_ALIVE: Final = "alive"
_SILENT: Final = "silent"
_DEAD: Final = "dead"


@click.command(short_help="List the running instances of a server.")
@target_options
@json_option
def instances(target: Target, *, as_json: bool) -> None:
    """List the instances: which are alive, and what each has in memory.

    An instance is one process of a server. It says every few seconds that it runs, with its numbers of sessions in
    memory and of open streams; one that has stopped in order is not listed. It is silent when it has said nothing for
    longer than the time after which servers take it for dead (MCP_SESSION_STORE_INSTANCE_TIMEOUT, 30 s unless set), and
    dead when its process was killed or has crashed; a day later it is removed. WAITING is the number of messages of
    clients that other instances have accepted for it and that it has not read yet. Instances of an older version say
    nothing of their namespace, and are listed in each.
    """
    silent_after = timedelta(seconds=InstanceSettings.from_environment().instance_timeout)

    async def read() -> Sequence[RunningInstance]:
        async with target.mailbox() as mailbox:
            return await mailbox.instances()

    found = run(read())
    if as_json:
        print_json({"namespace": target.namespace, "instances": [_as_json(one, silent_after) for one in found]})
    elif found:
        print_table(_COLUMNS, [_cells(one, silent_after) for one in found])
    else:
        click.echo(f"no instance serves the namespace {target.namespace!r}", err=True)


def _state(one: RunningInstance, silent_after: timedelta) -> str:
    if one.heartbeat.released:
        return _DEAD
    return _SILENT if one.heartbeat.ago > silent_after else _ALIVE


def _cells(one: RunningInstance, silent_after: timedelta) -> list[str]:
    # A version without a number says nothing of the others.
    is_known = one.version != ""
    return [
        one.instance,
        _state(one, silent_after),
        f"{span(one.heartbeat.ago)} ago",
        f"{one.started_at:%Y-%m-%d %H:%M:%S}",
        one.server,
        one.version,
        "" if one.number is None else str(one.number),
        number(one.residents) if is_known else "",
        number(one.streams) if is_known else "",
        number(one.waiting),
    ]


def _as_json(one: RunningInstance, silent_after: timedelta) -> dict[str, Any]:
    return {
        "instance": one.instance,
        "state": _state(one, silent_after),
        "heard_of_ago": one.heartbeat.ago,
        "started_at": one.started_at,
        "server": one.server,
        "version": one.version,
        "number": one.number,
        "sessions": one.residents,
        "streams": one.streams,
        "waiting": one.waiting,
    }
