"""The table of notes."""

import sqlalchemy as sa
from alembic import op

revision = "notes"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "notes", sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.String, nullable=False)
    )


def downgrade() -> None:
    op.drop_table("notes")
