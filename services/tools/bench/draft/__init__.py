"""`wisp bench draft`: acceptance, cost and gain of drafts, by source and stop rule."""
