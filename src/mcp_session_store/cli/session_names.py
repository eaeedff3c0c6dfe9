"""Names of sessions on the command line: a key, a shortened key, or a session id, which is hashed at once."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final
from uuid import UUID

import click

from mcp_session_store.cli.options import Failure, run
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_session_store.cli.target import Target

__all__ = ["key_of", "keys_of"]

# MCP 2025-11-25, basic/transports, session management: visible ASCII. The SDK's are 32 hexadecimal digits.
_SESSION_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_DIGITS: Final = 32
_CANDIDATES: Final = 10
"""Keys that are named where a shortened one stands for several."""


def key_of(target: Target, names: Sequence[str]) -> UUID:
    """Return the key of the one session that is named."""
    if len(given := _given(names)) != 1:
        raise click.UsageError("show takes one session: a session id, a key, or - to read it from standard input")
    return keys_of(target, given)[0]


def keys_of(target: Target, names: Sequence[str]) -> list[UUID]:
    """Return the keys of the sessions that are named, in their order and each once."""
    read = list(map(_read, _given(names)))
    # The database knows what a shortened key stands for.
    shortened = {digits for digits in read if isinstance(digits, str)}
    found = run(_found(target, shortened)) if shortened else {}
    return list(dict.fromkeys(found[one] if isinstance(one, str) else one for one in read))


def _given(names: Sequence[str]) -> Sequence[str]:
    given = [name for name in names if name != "-"]
    return given if len(given) == len(names) else [*given, *sys.stdin.read().split()]


def _read(name: str) -> UUID | str:
    """Return the key of a session, or the digits of a shortened one."""
    text = name.lower().removesuffix("…").removesuffix("...")
    digits = text.replace("-", "")
    if re.fullmatch(f"[0-9a-f]{{1,{_DIGITS - 1}}}", digits) and text.removesuffix("-") in (digits, _dashed(digits)):
        return digits
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
            "a list of the sessions"
        )
    return session_key(name)


def _dashed(digits: str) -> str:
    """Return the beginning of a key with its dashes; one at the end is left out."""
    return "-".join(filter(None, (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])))


async def _found(target: Target, shortened: set[str]) -> dict[str, UUID]:
    """Return the keys that shortened ones stand for."""
    async with target.directory() as directory:
        keys = {digits: await directory.keys_beginning_with(digits, limit=_CANDIDATES + 1) for digits in shortened}
    for digits, candidates in keys.items():
        # No more of the name, which may be part of a session id.
        begin = digits[:8]
        if not candidates:
            raise Failure(
                f"no session in namespace {target.namespace} has a key that begins with {begin}; a session id is given "
                "in full"
            )
        if len(candidates) > 1:
            named = ", ".join(map(str, candidates[:_CANDIDATES]))
            more = " and more" if len(candidates) > _CANDIDATES else ""
            raise Failure(f"{begin} is short for the keys {named}{more}; write more of one")
    return {digits: key for digits, (key,) in keys.items()}
