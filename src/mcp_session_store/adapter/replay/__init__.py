"""Restore by replay: the messages that are replayed, and how the application learns of it."""
