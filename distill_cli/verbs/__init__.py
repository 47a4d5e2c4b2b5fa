"""One file a verb: the module's docstring is its help, `declare` declares its flags, `main` runs it."""
