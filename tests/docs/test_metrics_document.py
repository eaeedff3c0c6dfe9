"""The table of metrics in the documents, and the dashboard: they have what the code has."""

from __future__ import annotations

import json
import re

from mcp_session_store import telemetry
from tests.support.pages import ROOT, text_of

UNITS = {"s": "_seconds", "By": "_bytes"}


def table() -> str:
    """Return the table of all instruments."""
    lines = ["| name | kind | unit | what | attributes |", "| --- | --- | --- | --- | --- |"]
    for each in telemetry.INSTRUMENTS:
        attributes = ", ".join(f"`{name}`" for name in each.attributes if name != telemetry.NAMESPACE)
        lines.append(f"| `{each.name}` | {each.kind} | `{each.unit}` | {each.description} | {attributes} |")
    return "\n".join(lines)


def prometheus_names() -> set[str]:
    """Return the names that the instruments have in Prometheus."""
    names = set()
    for each in telemetry.INSTRUMENTS:
        name = each.name.replace(".", "_") + UNITS.get(each.unit, "")
        if each.kind == "histogram":
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")}
        else:
            names.add(f"{name}_total" if each.kind == "counter" else name)
    return names


def test_the_document_has_the_table_of_the_code() -> None:
    assert table() in text_of("reference/metrics.md"), f"the table should be:\n{table()}"


def test_the_dashboard_shows_every_instrument_by_its_name() -> None:
    text = (ROOT / "examples" / "grafana-dashboard.json").read_text()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used = set()
    for panel in panels:
        for target in panel.get("targets", ()):
            used |= set(re.findall(r"\b(mcp_\w+)(?=\{)", target["expr"]))
    assert used - prometheus_names() == set()
    shown = {name.removesuffix("_bucket").removesuffix("_count") for name in used}
    assert {
        name.removesuffix("_bucket") for name in prometheus_names() if not name.endswith(("_count", "_sum"))
    } == shown


def test_no_two_instruments_share_a_name() -> None:
    names = [each.name for each in telemetry.INSTRUMENTS]
    assert len(set(names)) == len(names)
    assert all(each.description and each.unit for each in telemetry.INSTRUMENTS)
