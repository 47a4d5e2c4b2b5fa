"""Sample sequences, score them, and pack them into micro-batches."""
