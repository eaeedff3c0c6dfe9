"""All modules that know the MCP SDK: they restore sessions from the records of any store."""

from __future__ import annotations

from mcp_session_store.adapter.supported import SUPPORTED_SDK
from mcp_session_store.installed import installed_version

try:
    # Imported here, so that the error names the SDK's version, whichever name that version lacks.
    from mcp_session_store.adapter import frameworks as _frameworks  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mcp-session-store works with mcp{SUPPORTED_SDK}; mcp {installed_version('mcp') or '(version unknown)'} is "
        f"installed, and does not fit: {error}. Install a version that does: pip install 'mcp{SUPPORTED_SDK}'"
    ) from error
