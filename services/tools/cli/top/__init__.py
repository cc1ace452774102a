"""`wisp top`."""
