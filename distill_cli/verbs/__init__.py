"""One file a verb: what `distill VERB` does. No torch."""
