"""Why a user of a database may not do what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Barred"]


@dataclass(frozen=True, slots=True)
class Barred:
    """Why a user may not change a schema."""

    reason: str
    remedy: str
    hides: bool = False
    """Whether there may be tables that the user does not see."""
