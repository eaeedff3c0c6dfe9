"""What the commands for events print: pages of logs, the events of one session, statistics."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from mcp_session_store.cli.output import Column, ago, number, plural, print_json, print_table, print_text, size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from mcp_session_store.sql.admin.events import EventStatistics, LogDetails, LoggedEvent, LogPage, StoredLog
    from mcp_session_store.sql.admin.partitions import Partition

__all__ = ["print_events", "print_page", "print_statistics"]

_LOG_COLUMNS: Final = (
    Column(title="KEY", width=36),
    Column(title="EVENTS", width=9, right=True),
    Column(title="BYTES", width=9, right=True, rank=1),
    Column(title="FIRST", width=9, right=True, rank=4),
    Column(title="LAST", width=9, right=True, rank=3),
    Column(title="OLDEST", width=10, rank=2),
)


def print_page(page: LogPage, *, first: bool, all_pages: bool, as_json: bool) -> None:
    if as_json and all_pages:
        for log in page.logs:
            print_json(asdict(log), indent=None)
    elif as_json:
        print_json({"as_of": page.as_of, "logs": [asdict(log) for log in page.logs], "next": page.next})
    elif page.logs:
        print_table(_LOG_COLUMNS, [_log_row(log, page.as_of) for log in page.logs], header=first)


def _log_row(log: StoredLog, now: datetime) -> Sequence[str]:
    oldest = "" if log.oldest_at is None else ago(log.oldest_at, now)
    return [str(log.key), number(log.events), size(log.bytes), str(log.first), str(log.last), oldest]


_EVENT_COLUMNS: Final = (
    Column(title="SEQUENCE", width=8, right=True),
    Column(title="STREAM", width=12, flexible=True, rank=2),
    Column(title="POSITION", width=8, right=True, rank=4),
    Column(title="KIND", width=12),
    Column(title="STORED", width=10, rank=1),
    Column(title="BYTES", width=9, right=True, rank=3),
    Column(title="ABOUT", width=12, flexible=True),
)


def print_events(page: LogDetails, *, first: bool, all_pages: bool, payloads: bool, as_json: bool) -> None:
    if as_json:
        listed = [_event_as_json(event, payloads=payloads) for event in page.events]
        if all_pages:
            for event in listed:
                print_json(event, indent=None)
        else:
            print_json({"as_of": page.as_of, "log": asdict(page.log), "events": listed, "next": page.next})
    elif payloads:
        _print_payloads(page)
    elif page.events:
        rows = [_event_row(event, page.as_of) for event in page.events]
        print_table(_EVENT_COLUMNS, rows, header=first)


def _event_row(event: LoggedEvent, now: datetime) -> Sequence[str]:
    return [
        str(event.sequence),
        event.stream,
        str(event.position),
        event.kind,
        ago(event.created_at, now),
        size(event.bytes),
        _about(event),
    ]


def _print_payloads(page: LogDetails) -> None:
    for event in page.events:
        parts = [
            str(event.sequence),
            f"stream {event.stream}, position {event.position}, {event.kind}",
            f"{event.created_at:%Y-%m-%d %H:%M:%S} UTC, {size(event.bytes)}",
        ]
        print_text("  ".join(parts), length=2000)
        if event.message is not None:
            print_text(event.message, length=len(event.message))


def _event_as_json(event: LoggedEvent, *, payloads: bool) -> dict[str, Any]:
    document = asdict(event)
    message = document.pop("message")
    document["method"], document["request_id"] = _method_and_id(event)
    return document | ({"message": message} if payloads else {})


def _about(event: LoggedEvent) -> str:
    method, request_id = _method_and_id(event)
    parts = [] if method is None else [method]
    if request_id is not None:
        parts.append(f"id {request_id}")
    return " ".join(parts)


def _method_and_id(event: LoggedEvent) -> tuple[str | None, str | int | None]:
    """Return the method and the request id of a message; `None` for a text that is not one, or was not read."""
    try:
        message = json.loads(event.message or "")
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(message, dict):
        return None, None
    method, request_id = message.get("method"), message.get("id")
    return method if isinstance(method, str) else None, request_id if isinstance(request_id, str | int) else None


def print_statistics(statistics: EventStatistics) -> None:
    now = statistics.as_of
    sessions = f"{number(statistics.sessions)} {plural('session', statistics.sessions)}"
    counted = f"{number(statistics.events)} {plural('event', statistics.events)}"
    oldest = "" if statistics.oldest_at is None else f", the oldest from {ago(statistics.oldest_at, now)}"
    click.echo(f"{counted} of {sessions}, {size(statistics.bytes)} of messages{oldest}")
    if statistics.index_bytes is None:
        click.echo(f"the database file takes {size(statistics.table_bytes)}")
    else:
        click.echo(f"tables take {size(statistics.table_bytes)}, indexes {size(statistics.index_bytes)}")
    if statistics.instances:
        click.echo()
        columns = (
            Column(title="INSTANCE", width=24, flexible=True),
            Column(title="STARTED", width=10, rank=1),
            Column(title="LAST BEAT", width=10),
        )
        rows = [[one.instance, ago(one.started_at, now), ago(one.beat_at, now)] for one in statistics.instances]
        print_table(columns, rows)
    if statistics.partitions:
        click.echo()
        partition_columns = (
            Column(title="PARTITION", width=33, rank=1),
            Column(title="FROM", width=16),
            Column(title="TO", width=16),
            Column(title="SIZE", width=9, right=True),
        )
        print_table(partition_columns, [_partition_row(one) for one in statistics.partitions])


def _partition_row(partition: Partition) -> Sequence[str]:
    def when(moment: datetime | None) -> str:
        return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"

    return [partition.name, when(partition.since), when(partition.until), size(partition.size)]
