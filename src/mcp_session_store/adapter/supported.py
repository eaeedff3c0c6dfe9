"""The versions of the MCP SDK that the adapter works with."""

from __future__ import annotations

from typing import Final

__all__ = ["SUPPORTED_SDK"]

SUPPORTED_SDK: Final = ">=2.3,<3"
"""Versions of the SDK that have what the adapter extends."""
