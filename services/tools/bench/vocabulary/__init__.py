"""Drafts by a model with another vocabulary than the target's."""
