"""Does the adapter know this repository? Tests on fixed rows, and a verdict.

It refuses to train, and to call passed what could not be measured.
"""
