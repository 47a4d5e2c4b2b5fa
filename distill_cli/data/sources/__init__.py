"""Sources of examples: one file each, with a function `load`."""
