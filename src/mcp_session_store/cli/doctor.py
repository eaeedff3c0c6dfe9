"""The command that looks at all that a server needs of its database."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from mcp_session_store.cli.options import (
    Failure,
    json_option,
    namespace_option,
    option,
    run,
    schema_option,
    shown_default,
    url_option,
)
from mcp_session_store.cli.output import number, plural, print_json, print_text
from mcp_session_store.retention import RetentionPolicy

if TYPE_CHECKING:
    from mcp_session_store.sql.admin.doctor import Finding

__all__ = ["doctor"]

_COLORS: Final = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": None}


@click.command(short_help="Look at all that a server needs of its database.")
@url_option
@schema_option
@namespace_option
@option(
    "--pool-size",
    type=click.IntRange(1),
    metavar="N",
    help="Connections that each process of the server takes for queries. Not given: as the URL says, or 5.",
)
@option(
    "--timeout",
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="How long each look may take; all together take six times as long at most.",
)
@json_option
def doctor(
    url: str, schema: str | None, namespace: str, pool_size: int | None, timeout: float, *, as_json: bool
) -> None:
    """Look at all that a server needs of its database, without changing anything.

    One line each: what is there, and what to do where it is not right. A role that only reads will do.

    Exit code 1 when anything fails, as when there is no connection; 0 with warnings only.
    """
    from mcp_session_store.sql.admin.doctor import Verdict, examine

    async def go() -> list[Finding]:
        findings = []
        async for finding in examine(url, namespace=namespace, schema=schema, pool_size=pool_size, timeout=timeout):
            findings.append(finding)
            if not as_json:
                _print(finding)
        return findings

    findings = run(go())
    findings.append(_policy())
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings[-1])
    if failed := sum(finding.verdict is Verdict.FAIL for finding in findings):
        raise Failure(f"{number(failed)} {plural('look', failed)} found what no server can work with")


def _policy() -> Finding:
    """Return the lifetimes of sessions that the environment asks for, as a server reads them."""
    from mcp_session_store.sql.admin.doctor import Finding

    policy = RetentionPolicy.from_environment()
    texts = {name: shown_default(getattr(policy, name)) for name in RetentionPolicy.model_fields}
    found = ", ".join(f"{name} {text}" for name, text in texts.items())
    return Finding(check="retention", found=f"{found}, by this environment", values=texts)


def _print(finding: Finding) -> None:
    line = f"{finding.found}. To do: {finding.remedy}" if finding.remedy else finding.found
    verdict = click.style(f"{finding.verdict.value:<8}", fg=_COLORS[finding.verdict.value])
    click.echo(f"{verdict}{finding.check:<15}", nl=False)
    print_text(line, length=5000)
