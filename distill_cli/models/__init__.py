"""Models as files on disk: where they are, what they share, which layers adapters go to. No torch."""
