"""The tables, the migrations that create them, and the check that a database has the tables of this version."""
