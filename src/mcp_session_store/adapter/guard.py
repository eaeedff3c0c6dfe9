"""The guard against foreign hosts (DNS rebinding), by one rule for all frameworks.

The SDK compares Host and Origin headers with lists of texts, and has no word on how to allow one that it refuses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Final, NamedTuple

from mcp.server.transport_security import TransportSecuritySettings

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.records import display_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["host_guard"]

logger = logging.getLogger(__name__)

LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine, as they stand in a Host header."""
MAX_LOGGED: Final = 100
"""Number of refused headers that are logged, each once: they are the clients' own texts."""

_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(\d{1,5}|\*))?")
_ORIGIN: Final = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)")


class _Host(NamedTuple):
    name: str
    port: str | None
    """`None`: any port, and none."""

    @classmethod
    def read(cls, text: str) -> _Host | None:
        """Return the host that a text names; `None` where it is no host."""
        match = _HOST.fullmatch(text.lower())
        # `example.com.` is the absolute form of `example.com` (RFC 1034, section 3.1).
        name = "" if match is None else match[1].removesuffix(".")
        return cls(name, match[2]) if match and name else None

    def allows(self, other: _Host) -> bool:
        # Clients leave out the port that is their scheme's, and a proxy does not say here by which they came.
        is_left_out = other.port is None and self.port in _DEFAULT_PORTS.values()
        return self.name == other.name and (self.port in (None, other.port) or is_left_out)


class _AllowedHosts(list[str]):
    """Values of the Host header that are allowed. The SDK asks `in`, and logs what is not there."""

    def __init__(self, hosts: Sequence[_Host]) -> None:
        super().__init__(host.name if host.port is None else f"{host.name}:{host.port}" for host in hosts)
        self._hosts = hosts
        self._logged: set[str] = set()

    def __contains__(self, header: object) -> bool:
        if self.allows(str(header)):
            return True
        _explain(str(header), self._logged, "Host", "--allowed-host", "allowed_hosts")
        return False

    def allows(self, text: str) -> bool:
        asked = _Host.read(text)
        return asked is not None and any(host.allows(asked) for host in self._hosts)


class _AllowedOrigins(list[str]):
    """Values of the Origin header that are allowed: those given, and those of pages that an allowed host serves."""

    def __init__(self, origins: Sequence[str], hosts: _AllowedHosts) -> None:
        super().__init__(origins)
        self._hosts = hosts
        self._logged: set[str] = set()

    def __contains__(self, header: object) -> bool:
        origin = _without_dot(str(header).lower())
        match = _ORIGIN.fullmatch(origin)
        if origin in list(self) or (match and match[1] in ("http", "https") and self._hosts.allows(match[2])):
            return True
        _explain(str(header), self._logged, "Origin", "--allowed-origin", "allowed_origins")
        return False


def _explain(header: str, logged: set[str], name: str, option: str, keyword: str) -> None:
    if header in logged or len(logged) >= MAX_LOGGED:
        return
    logged.add(header)
    logger.warning(
        "a request with the %s header %r is refused; if clients are to reach this server so, allow it: %s for "
        "mcp-session-store serve, %s= for run_durable",
        name,
        display_text(header),
        option,
        keyword,
    )


def host_guard(host: str, allowed_hosts: Sequence[str], allowed_origins: Sequence[str]) -> TransportSecuritySettings:
    """Return the guard of a server: on where it listens on this machine only, and where hosts or origins are given.

    Args:
        host: Address that is listened on.
        allowed_hosts: Hosts by which clients reach the server, as `mcp.example.com`, for any port and none, or
            `mcp.example.com:8443`. `*`: any, so that there is no guard.
        allowed_origins: Origins of pages of other hosts that may send requests, as `https://app.example.com`.

    Raises:
        ConfigurationError: A value is no host, or no origin.
    """
    for name, values in (("allowed_hosts", allowed_hosts), ("allowed_origins", allowed_origins)):
        if not isinstance(values, Collection) or isinstance(values, str) or not all(isinstance(v, str) for v in values):
            raise ConfigurationError(f"{name}={values!r} is no list of texts; give one, as in ['mcp.example.com']")
    is_loopback = host.lower() in ("localhost", "::1") or host.startswith("127.")
    if "*" in allowed_hosts or not (is_loopback or allowed_hosts or allowed_origins):
        if "*" in allowed_hosts and allowed_origins:
            raise ConfigurationError("allowed_hosts '*' allows every request; leave out allowed_origins, or name hosts")
        return TransportSecuritySettings(enable_dns_rebinding_protection=False)
    if not (is_loopback or allowed_hosts):
        raise ConfigurationError(
            f"allowed_origins without allowed_hosts refuses all requests, because the server listens on {host}: name "
            "the hosts by which clients reach it"
        )
    hosts = [_read_host(text) for text in allowed_hosts]
    if is_loopback:
        hosts += [_Host(name, None) for name in LOOPBACK]
    settings = TransportSecuritySettings()
    # Set afterwards, because the model makes plain lists of what it is given.
    settings.allowed_hosts = names = _AllowedHosts(hosts)
    settings.allowed_origins = _AllowedOrigins([_read_origin(text) for text in allowed_origins], names)
    return settings


def _read_host(text: str) -> _Host:
    bracketed = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
    if (host := _Host.read(bracketed.strip())) is None:
        raise ConfigurationError(
            f"the allowed host {text!r} is no host: write its name, with or without a port, as in mcp.example.com"
        )
    return _Host(host.name, None if host.port == "*" else host.port)


def _read_origin(text: str) -> str:
    origin = _without_dot(text.strip().rstrip("/").lower())
    match = _ORIGIN.fullmatch(origin)
    if origin != "null" and (match is None or _Host.read(match[2]) is None):
        raise ConfigurationError(
            f"the allowed origin {text!r} is no origin: write scheme and host, as in https://app.example.com"
        )
    # Browsers leave it out.
    return origin if match is None else origin.removesuffix(f":{_DEFAULT_PORTS.get(match[1])}")


def _without_dot(origin: str) -> str:
    """Return an origin without the dot that makes the name of its host absolute."""
    return re.sub(r"\.(:\d+)?$", r"\1", origin)
