"""What the commands for sessions print: pages of a list, one session, statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from mcp_session_store.cli.output import (
    Column,
    ago,
    bar,
    number,
    plural,
    print_json,
    print_table,
    print_text,
    session_as_json,
    size,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta

    from mcp_session_store.retention import SweepReport
    from mcp_session_store.sql.admin.sessions import SessionDetails, SessionPage, Statistics, StoredSession

__all__ = ["details_as_json", "print_details", "print_page", "print_statistics", "statistics_as_json"]

_KEY: Final = Column(title="KEY", width=36)


_CLIENT: Final = Column(title="CLIENT", width=12, flexible=True, rank=1)


_PRINCIPAL: Final = Column(title="PRINCIPAL", width=12, flexible=True, rank=4)


_INSTANCE: Final = Column(title="INSTANCE", width=12, flexible=True, rank=5)


_OPENED: Final = Column(title="OPENED", width=10, rank=3)


_SEEN: Final = Column(title="SEEN", width=10, rank=2)


_LAST_COLUMNS: Final[Mapping[str, Sequence[Column]]] = {
    "live": (_SEEN, Column(title="EXPIRES", width=10, rank=2)),
    "expired": (_SEEN, Column(title="EXPIRED", width=10, rank=2)),
    "ended": (Column(title="ENDED", width=10, rank=2), Column(title="BY", width=8, rank=2)),
}


def print_page(page: SessionPage, state: str, *, first: bool, all_pages: bool, as_json: bool) -> None:
    if as_json and all_pages:
        for session in page.sessions:
            print_json(session_as_json(session), indent=None)
    elif as_json:
        listed = [session_as_json(session) for session in page.sessions]
        print_json({"as_of": page.as_of, "sessions": listed, "next": page.next})
    elif page.sessions:
        columns = [_KEY, _CLIENT, _PRINCIPAL, _INSTANCE, _OPENED, *_LAST_COLUMNS[state]]
        rows = [_row(session, page.as_of, state) for session in page.sessions]
        print_table(columns, rows, header=first)


def _row(session: StoredSession, now: datetime, state: str) -> Sequence[str]:
    if state == "ended":
        last = ago(session.ended_at, now), session.end_reason or ""
    else:
        last = ago(session.last_seen_at, now), ago(session.expires_at, now)
    return [
        str(session.key),
        session.client_name,
        "" if session.principal is None else session.principal.display,
        session.instance_hint,
        ago(session.created_at, now),
        *last,
    ]


def details_as_json(found: SessionDetails, *, params: bool, values: bool) -> dict[str, Any]:
    def text(name: str, value: str, *, shown: bool = params) -> dict[str, Any]:
        return {f"{name}_bytes": len(value.encode())} | ({name: value} if shown else {})

    return {
        "as_of": found.as_of,
        **session_as_json(found.session),
        **text("initialize_params", found.initialize_params),
        "journal": [
            {"method": entry.method, "subject": entry.subject, **text("params", entry.params)}
            for entry in found.journal
        ],
        "state": [
            {"name": state.name, "expires_at": state.expires_at, **text("value", state.value, shown=values)}
            for state in found.state
        ],
    }


def print_details(found: SessionDetails, *, params: bool, values: bool) -> None:
    session, now = found.session, found.as_of

    def when(moment: datetime | None) -> str:
        return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC, {ago(moment, now)}"

    principal = session.principal
    lines = [
        ("key", str(session.key)),
        ("state", session.state.value),
        ("client", f"{session.client_name} {session.client_version}"),
        ("principal", "none" if principal is None else principal.display),
        *([] if principal is None else [("digest", principal.digest.hex())]),
        ("instance", session.instance_hint),
        ("stream", _stream_of(session, now)),
        ("protocol", session.protocol_version),
        ("opened", when(session.created_at)),
        ("last seen", when(session.last_seen_at)),
        ("expires", when(session.expires_at)),
        *([] if session.ended_at is None else [("ended", f"{when(session.ended_at)}, by {session.end_reason}")]),
        ("restores", number(session.restores)),
        ("revision", number(session.revision)),
        ("params", size(len(found.initialize_params.encode()))),
        ("journal", f"{len(found.journal)} calls"),
        *(("", f"{entry.method} {entry.subject}".rstrip()) for entry in found.journal),
        ("values", f"{number(len(found.state))} of its state"),
        *(
            ("", ", ".join([f"{state.name} {size(len(state.value.encode()))}", *_end_of(state.expires_at, now)]))
            for state in found.state
        ),
    ]
    for name, text in lines:
        print_text(f"{name:<11}{text}", length=2000)
    if params:
        for text in (found.initialize_params, *(entry.params for entry in found.journal)):
            if text:
                print_text(text, length=len(text))
    if values:
        for state in found.state:
            print_text(text := f"{state.name} {state.value}", length=len(text))


def _stream_of(session: StoredSession, now: datetime) -> str:
    if session.stream_holder is None:
        return "never opened"
    return f"opened last on instance number {session.stream_holder}, {ago(session.stream_opened_at, now)}"


def _end_of(expires_at: datetime | None, now: datetime) -> Sequence[str]:
    return [] if expires_at is None else [f"expires {ago(expires_at, now)}"]


def statistics_as_json(statistics: Statistics, preview: SweepReport) -> dict[str, Any]:
    return {
        "as_of": statistics.as_of,
        "live": statistics.live,
        "expired": statistics.expired,
        "ended": statistics.ended,
        "ages": [{"less_than_seconds": age, "live": count} for age, count in statistics.ages],
        "clients": [{"client": name, "live": count} for name, count in statistics.clients],
        "instances": [{"instance": name, "live": count} for name, count in statistics.instances],
        "mean_params_bytes": statistics.mean_params_bytes,
        "state_values": statistics.state_values,
        "state_bytes": statistics.state_bytes,
        "table_bytes": statistics.table_bytes,
        "index_bytes": statistics.index_bytes,
        "next_sweep": {"expired": preview.expired, "purged": preview.purged},
    }


def print_statistics(statistics: Statistics, preview: SweepReport) -> None:
    count = Column(title="SESSIONS", width=10, right=True)
    states = (
        ("live", statistics.live),
        ("expired, not yet swept", statistics.expired),
        ("ended, still kept", statistics.ended),
    )
    print_table([Column(title="STATE", width=24), count], [(name, number(n)) for name, n in states])

    ages = []
    most = max(n for _, n in statistics.ages)
    youngest: timedelta | None = None
    for age, n in statistics.ages:
        name = (
            f"less than {span(age)}"
            if age is not None
            else "older"
            if youngest is None
            else f"{span(youngest)} or more"
        )
        youngest = age
        ages.append((name, number(n), bar(n, most)))
    click.echo()
    print_table([Column(title="LIVE, OPENED AGO", width=24), count, Column(title="", width=0, rank=1)], ages)

    for title, counted in (("CLIENT", statistics.clients), ("INSTANCE", statistics.instances)):
        if counted:
            click.echo()
            name_column = Column(title=f"LIVE, {title}", width=24, flexible=True)
            print_table([name_column, count], [(name, number(n)) for name, n in counted])

    click.echo()
    if statistics.index_bytes is None:
        click.echo(f"the database file takes {size(statistics.table_bytes)}")
    else:
        click.echo(f"tables take {size(statistics.table_bytes)}, indexes {size(statistics.index_bytes)}")
    if statistics.mean_params_bytes is not None:
        click.echo(f"initialize params of a live session take {size(statistics.mean_params_bytes)} on average")
    if statistics.state_values:
        count_of_values = f"{number(statistics.state_values)} {plural('value', statistics.state_values)}"
        click.echo(f"the state of live sessions has {count_of_values} of {size(statistics.state_bytes)} in all")
    click.echo(
        f"the next sweep would end {number(preview.expired)} expired {plural('session', preview.expired)}, "
        f"and remove {number(preview.purged)} that ended long ago"
    )
