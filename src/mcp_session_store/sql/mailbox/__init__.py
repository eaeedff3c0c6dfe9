"""The running instances, and the messages that they send one another, in a SQL database."""
