"""What a fitted model is compared with, trained on the same items for as many steps.

It refuses to score anything.
"""
