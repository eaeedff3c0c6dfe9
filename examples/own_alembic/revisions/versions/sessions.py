"""The tables of the sessions.

A later version of mcp-session-store that needs a newer schema gets a revision like this one.
"""

from alembic import op

from mcp_session_store import migrations

revision = "sessions"
down_revision = "notes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade(op.get_bind())


def downgrade() -> None:
    """Leave the sessions: `mcp-session-store downgrade base` removes them."""
