"""Partitions of Postgres."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

__all__ = ["TablePartitions", "regclass"]

_ISO_MOMENT: Final = r"\d+-\d\d-\d\d [\d:.]+[+-][\d:]+"


class TablePartitions:
    """The partitions of a table of Postgres by a range of times, as its catalogs tell.

    Times are told where `DateStyle` is ISO, as it is unless set: other ways to write them can be ambiguous.

    Args:
        table: What they are partitions of.
    """

    def __init__(self, table: sa.Table) -> None:
        inherits = sa.table("pg_inherits", sa.column("inhrelid"), sa.column("inhparent"), schema="pg_catalog")
        classes = sa.table(
            "pg_class", sa.column("oid"), sa.column("relname", sa.Text), sa.column("relpartbound"), schema="pg_catalog"
        )
        bound = sa.func.pg_get_expr(classes.c.relpartbound, classes.c.oid, type_=sa.Text)

        def moment(pattern: str) -> sa.ColumnElement[Any]:
            return sa.cast(sa.func.substring(bound, pattern), postgresql.TIMESTAMP(timezone=True))

        self.rows: Final = inherits.join(classes, classes.c.oid == inherits.c.inhrelid)
        """What to select from; see `among`."""
        self.among: Final = inherits.c.inhparent == regclass(table)
        """Which rows there are the table's."""
        self.oid: Final = classes.c.oid
        self.name: Final = sa.cast(classes.c.relname, sa.Text)
        self.is_default: Final = bound == "DEFAULT"
        """Whether it is the one for whatever belongs to no other."""
        self.since: Final = moment(rf"FROM \('({_ISO_MOMENT})'\)")
        """NULL: since ever; or it is the default one."""
        self.until: Final = moment(rf"TO \('({_ISO_MOMENT})'\)")
        """NULL: it is the default one."""


def _quoted(table: sa.Table) -> str:
    names = (table.name,) if table.schema is None else (table.schema, table.name)
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def regclass(table: sa.Table) -> sa.ColumnElement[Any]:
    # The text is cast: the driver would send a number for a regclass.
    return sa.cast(sa.literal(_quoted(table), sa.Text), postgresql.REGCLASS)
