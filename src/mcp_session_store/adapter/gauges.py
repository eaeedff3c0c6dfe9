"""What the gauges show of a running manager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mcp_session_store.adapter.outage import Gate
    from mcp_session_store.adapter.readiness import Readiness
    from mcp_session_store.adapter.sessions.registry import Registry

__all__ = ["Gauges"]


class Gauges:
    """Numbers of a running manager, read when metrics are collected, in a thread of the application's.

    Args:
        readiness: State of the instance, and the namespace of its sessions.
        registry: Registry of the sessions in memory and of the restores under way.
        gate: Where requests wait while the store is away.
    """

    def __init__(self, readiness: Readiness, registry: Registry, gate: Gate) -> None:
        self.namespace: Final = readiness.namespace
        self._readiness = readiness
        self._registry = registry
        self._gate = gate

    @property
    def resident(self) -> int:
        """Number of sessions in memory that requests find."""
        return self._registry.resident

    @property
    def busy(self) -> int:
        """Number of those that are busy."""
        return self._registry.busy

    @property
    def restoring(self) -> int:
        """Number of restores under way."""
        return len(self._registry.restores)

    @property
    def streams(self) -> int:
        """Number of open GET streams."""
        return self._registry.streams

    @property
    def waiting(self) -> int:
        """Number of requests that wait for the store."""
        return sum(self._gate.waiting.values())

    @property
    def state(self) -> str:
        """State of the instance."""
        return self._readiness.state.value
