"""Learning of a hidden-state draft: what training and serving share, and drafts that learn from their sessions."""

__all__ = ["batches", "head_loss", "learner", "loss", "process", "reports", "supervisor", "update", "versions"]
