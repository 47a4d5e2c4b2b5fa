"""Start and stop the ranks of a run, on this machine and on a cluster."""
