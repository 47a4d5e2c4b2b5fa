"""Talk with what was trained, in the terminal (`distill chat`): models side by side, and the KL of each token."""
