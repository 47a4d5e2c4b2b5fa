"""The device mesh and what runs over its axes."""
