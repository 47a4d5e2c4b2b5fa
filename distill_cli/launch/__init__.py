"""How the ranks of a run are started and stopped, here and on a cluster."""
