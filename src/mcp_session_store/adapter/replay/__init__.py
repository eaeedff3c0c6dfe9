"""Restore by replay: what is replayed, and how the application learns of it."""
