"""Numbered, append-only changes to the schema, run by alembic from `migrate.py`."""
