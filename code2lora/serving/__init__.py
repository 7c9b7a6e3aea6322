"""Complete code with a loaded base model whose adapter can be swapped between requests.

Holds the model, the completion engine and the HTTP application. It is told which adapter to use
and never decides which commit is current; it never writes a file.
"""
