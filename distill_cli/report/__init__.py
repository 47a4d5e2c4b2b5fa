"""Reports about runs, read from their folders."""
