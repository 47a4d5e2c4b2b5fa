"""How the ranks of a run are started and stopped."""
