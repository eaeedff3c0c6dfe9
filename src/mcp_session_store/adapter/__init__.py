"""All that knows the MCP SDK: it restores sessions from a store's records, whatever the store is."""

from __future__ import annotations

import importlib.metadata
from typing import Final

SUPPORTED_SDK: Final = ">=2.3,<3"
"""The versions of the SDK that have what the adapter extends."""

try:
    # Imported here, so that an SDK that does not fit is told by its version, whichever name it lacks.
    from mcp_session_store.adapter import frameworks as _frameworks  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mcp-session-store works with mcp{SUPPORTED_SDK}; mcp {importlib.metadata.version('mcp')} is installed, and "
        f"does not fit: {error}. Install a version that does: pip install 'mcp{SUPPORTED_SDK}'"
    ) from error
