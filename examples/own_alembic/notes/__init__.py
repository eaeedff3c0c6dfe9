"""A server that keeps notes, and durable sessions in the same database."""
