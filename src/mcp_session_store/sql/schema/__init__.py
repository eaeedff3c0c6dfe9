"""The tables, the migrations that make them, and the check that a database has the ones that this version needs."""
