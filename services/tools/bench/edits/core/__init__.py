"""Edits of documents, and the rounds that they take. Pure: no I/O, no clock, no logging."""
