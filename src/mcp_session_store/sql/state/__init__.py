"""The state of sessions in a SQL database."""
