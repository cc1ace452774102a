"""Redis: every key and script."""
