"""`wisp replay`."""
