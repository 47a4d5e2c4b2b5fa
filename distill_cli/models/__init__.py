"""Model folders: where they are, what a pair shares, which layers get adapters. No torch."""
