"""Figures: how well a model writes what it has never seen, beside what else could be done.

It refuses to choose what is trained.
"""
