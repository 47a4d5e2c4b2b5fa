"""The scoring server: our own engines behind HTTP. No torch in its process."""
