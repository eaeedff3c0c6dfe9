"""Values under keys, which belong to no session: py-key-value's protocol on a SQL database."""
