"""Learning: the data, fitting and measuring of every model that the package ships or trains.

It gathers source files and mines tasks from histories, trains tokenizers, base decoders and
hypernetworks, and evaluates them. It refuses to serve anything, to know the daemon or the database,
and to publish a checkpoint whose evaluation repositories it has trained on.
"""
