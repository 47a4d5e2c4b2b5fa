"""What a user can set, how it is composed, and what is refused. No torch here."""
