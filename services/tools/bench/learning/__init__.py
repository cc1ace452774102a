"""Drafts that learn from their sessions: acceptance over the requests of one domain, and elsewhere."""
