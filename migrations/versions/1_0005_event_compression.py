"""Compression of events: LZ4 compresses long messages, in a fraction of the time of Postgres' own method.

To compress a message of some kilobytes took longer than all else that storing it needs. What is stored already stays as
it is, and is read as before. A server that does not know LZ4 (before Postgres 14, or built without it) keeps its own
method.

It needs the table of events, with its partitions, for itself for a moment, and everything else waits behind it
meanwhile. So it waits for running transactions for two seconds at most per lock, of which each partition is one, then
fails and changes nothing; run it again. The lock of the migration before it is held meanwhile, if both run at once.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "1_0005_event_compression"
down_revision = "1_0004_fewer_indexes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _set_compression("lz4")


def downgrade() -> None:
    _set_compression("default")


def _set_compression(method: str) -> None:
    context = op.get_context()
    if context.dialect.name != "postgresql":
        return
    table = sa.table("mcp_session_event", schema=context.version_table_schema)
    name = context.dialect.identifier_preparer.format_table(table)
    literal = name.replace("'", "''")
    op.execute("SET LOCAL lock_timeout = '2s'")
    # On the server, because SQL that is printed runs on one that is not known yet.
    op.execute(
        f"""
        DO $$
        DECLARE part regclass;
        BEGIN
            IF EXISTS (
                SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)
            ) THEN
                -- It locks the table before its partitions, as all statements do; the other way round is a deadlock.
                LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE;
                FOR part IN
                    SELECT CAST('{literal}' AS regclass)
                    UNION SELECT CAST(inhrelid AS regclass) FROM pg_inherits
                    WHERE inhparent = CAST('{literal}' AS regclass)
                LOOP
                    EXECUTE 'ALTER TABLE ' || part || ' ALTER COLUMN message SET COMPRESSION {method}';
                END LOOP;
            END IF;
        END
        $$
        """  # noqa: S608 - a quoted name, and constants
    )
    op.execute("SET LOCAL lock_timeout TO DEFAULT")
