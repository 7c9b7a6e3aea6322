"""What hypernetworks learn from: histories, snapshots and tasks mined from git.

It refuses to know any model but the encoder whose vectors it stores.
"""
