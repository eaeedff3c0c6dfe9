"""${message}

Say here which tables it locks, and for how long.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

# <major version of the schema>_<number>_<name>. Within a major version migrations only add, so that older
# versions of the package run against a newer schema while a deployment rolls.
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    ${upgrades if upgrades else "..."}


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    ${downgrades if downgrades else "..."}
