"""Names of sessions on the command line: a key, or a session id, which is hashed at once and goes no further."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final
from uuid import UUID

import click

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["key_of", "keys_of"]

# MCP 2025-11-25, basic/transports, session management: visible ASCII. The SDK's are 32 hexadecimal digits.
_SESSION_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


def key_of(names: Sequence[str]) -> UUID:
    """Return the key of the one session that is named."""
    keys = keys_of(names)
    if len(keys) != 1:
        raise click.UsageError("show takes one session: a session id, a key, or - to read it from standard input")
    return keys[0]


def keys_of(names: Sequence[str]) -> list[UUID]:
    """Return the keys of the sessions that are named, in their order and each once."""
    given = [name for name in names if name != "-"]
    if len(given) < len(names):
        given += sys.stdin.read().split()
    return list(dict.fromkeys(map(_key, given)))


def _key(name: str) -> UUID:
    try:
        key = UUID(name)
    except ValueError:
        key = None
    # With dashes, and of version 8: a server that has UUIDs for session ids has others.
    if key is not None and key.version == 8 and str(key) == name.lower():
        return key
    if not _SESSION_ID.fullmatch(name):
        # The message does not repeat the name, which may be most of a session id.
        raise ConfigurationError(
            "a name is neither a key nor a session id (up to 128 visible ASCII characters); copy the key from "
            "mcp-session-store sessions list"
        )
    return session_key(name)
