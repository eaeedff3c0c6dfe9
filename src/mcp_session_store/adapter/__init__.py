"""All that knows the MCP SDK: it restores sessions from a store's records, whatever the store is."""
