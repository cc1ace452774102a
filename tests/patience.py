"""The longest wait of a test for an event."""

HANG_S = 300.0
"""Seconds. Only a hang lasts this long, on a slow and busy machine too."""
