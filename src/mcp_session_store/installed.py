"""Versions of the packages that are installed."""

from __future__ import annotations

import importlib.metadata

__all__ = ["installed_version"]


def installed_version(package: str) -> str | None:
    """Return the version of a package; `None` where its metadata are missing, as in frozen applications."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
