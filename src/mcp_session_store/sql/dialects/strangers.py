"""Find out what answers at an address where no Postgres server is, because the driver does not say."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Final

__all__ = ["NotPostgres", "refuse_stranger"]

_REFUSAL: Final = re.compile(r'server at "(.+):(\d+)":? *(?:rejected SSL upgrade|server sent an error response)')
"""What asyncpg says when the answer to its request for TLS is not the expected one, or begins as that of an error."""
_CUT_OFF: Final = "closed in the middle of operation"
"""What asyncpg says where it did not ask for TLS, and the other end leaves."""
_REQUEST: Final = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
"""SSLRequest: "Message Formats" in the manual of Postgres. Its server answers by one byte."""
_ANSWERS: Final = (b"S", b"N")
_ERROR: Final = b"E\0\0"
"""Begin of an error of Postgres, whose length follows."""
_LOOK_FOR: Final = 1.0
"""Seconds that a look takes at most."""

_TLS: Final = b"\x15\x03"
_GREETINGS: Final = (
    (b"HTTP/", "it speaks HTTP"),
    (b"SSH-", "it speaks SSH"),
    (b"220", "it speaks SMTP or FTP"),
    (b"* OK", "it speaks IMAP"),
    (b"-", "it answers like Redis"),
    (b"+", "it answers like Redis, or a mail server"),
    (_TLS, "it expects TLS from the first byte on; write sslnegotiation=direct if it is one of Postgres 17 or later"),
)
"""What a server is, by the first bytes of its answer."""
_MYSQL: Final = (b"\x0a", b"\xff")
"""Fifth byte of what MySQL says first: the version of its protocol, or an error."""


class NotPostgres(ConnectionError):
    """What answers is no Postgres server; the text says what it is, as far as that can be known."""


async def refuse_stranger(error: Exception, host: object, port: object) -> None:
    """Ask once more for TLS where asyncpg got an answer that it did not understand, or was cut off.

    Args:
        error: What asyncpg says.
        host: The host, where it is told of one alone; without TLS its error names none.
        port: The port.

    Raises:
        NotPostgres: The answer is not one of a Postgres server.
    """
    if (named := _REFUSAL.search(str(error))) is not None:
        address = named[1], int(named[2])
    elif isinstance(host, str) and not host.startswith("/") and isinstance(port, int) and _CUT_OFF in str(error):
        address = host, port
    else:
        return
    answer = b""
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(_LOOK_FOR):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(_REQUEST)
                answer = await reader.read(64)
            finally:
                writer.close()
    if (name := _named(answer)) is not None:
        raise NotPostgres(name) from None


def _named(answer: bytes) -> str | None:
    """Return what a server is by its answer; `None` for one of Postgres, or none at all."""
    # A length of less than 65536, and no severity as in an error of Postgres.
    if answer[4:5] in _MYSQL and answer[2:4] == b"\0\0" and answer[5:6] != b"S":
        return "it speaks the protocol of MySQL"
    if not answer or answer in _ANSWERS or answer.startswith(_ERROR):
        return None
    return next((name for start, name in _GREETINGS if answer.startswith(start)), "it speaks another protocol")
