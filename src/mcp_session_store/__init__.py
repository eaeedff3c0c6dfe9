"""Durable, SQL-backed sessions for MCP servers on the official Python SDK."""
