"""What came of runs: read from their folders, and shown."""
