"""The draft model that reads the target's hidden states."""
