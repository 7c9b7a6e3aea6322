"""Turn repository text into LoRA weights: encoder, commit GRU, LoRA heads, checkpoints.

Knows torch and nothing of databases, daemons or servers. Everything outside this room needs only
what a family offers: read a snapshot or a diff into features, `initial`, `advance`, `adapter`.
"""
