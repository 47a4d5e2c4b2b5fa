"""The keys that a user can set, how they are composed, and what is refused. No torch here."""
