"""Push a published adapter to the servers and places that a repository names.

    target     one line of git configuration <-> a Target
    push       a Target and an adapter directory -> the server has it
    http       bounded requests with a timeout, to this machine unless another is allowed

Nothing here knows of databases or decides when; a push that fails raises UserError and changes
nothing that serves.
"""
