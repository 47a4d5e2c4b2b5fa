"""What this project brings of its own."""
