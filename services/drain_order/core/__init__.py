"""The order in which verifier pods may be deleted. Pure: no I/O, no clock."""
