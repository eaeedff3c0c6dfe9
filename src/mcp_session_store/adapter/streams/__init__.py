"""Streams that resume: events stored in a log, and read from it again."""
