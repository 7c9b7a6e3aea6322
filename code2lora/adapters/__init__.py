"""Write, read, verify and prune adapter directories in the format that PEFT loads.

Every published adapter is a new immutable directory; nothing here overwrites one or decides which
one is live.
"""
