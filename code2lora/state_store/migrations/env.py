"""Run by alembic: apply the migrations on the connection and in the transaction of the caller."""

from alembic import context

from code2lora.state_store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot alter most of a table in place; alembic makes a new one and copies.
    render_as_batch=True,
)
context.run_migrations()
