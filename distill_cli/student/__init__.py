"""The model that is trained: built, wrapped, stepped, and its weights handed out."""
