"""Gradients: rows of tokens, windows of commits, losses under generated adapters.

It refuses to read git and to say how good a model is.
"""
