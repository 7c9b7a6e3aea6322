"""Remember hidden states, adapters and what happened, in one SQL database.

Knows SQLAlchemy and nothing of git or torch: a hidden state is bytes with a digest here. Never
holds adapter weights, which are files derived from a state.
"""

from code2lora.state_store.store import Store

__all__ = ["Store"]
