"""What an installation without extras brings, and what an import of this package brings into a process."""

from __future__ import annotations

import tomllib
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.servers import ROOT


def _installed_with_this_package() -> set[str]:
    """The distributions that the declared dependencies bring, without extras of this package."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in declared]
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            name = canonicalize_name(requirement.name)
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for text in requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in found}


def test_no_package_is_installed_that_changes_logs() -> None:
    """The SDK logs through `rich`, three wrapped lines for one, where it is installed."""
    installed = _installed_with_this_package()
    assert {"mcp", "sqlalchemy", "greenlet", "click"} <= installed
    assert not {"rich", "typer", "fastmcp"} & installed
