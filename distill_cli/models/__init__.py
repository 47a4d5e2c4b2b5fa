"""Models as files on disk: where they are, what they share, which layers get adapters. No torch."""
