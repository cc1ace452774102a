"""The verifier: owns the target model, checks drafts in batches, commits what is accepted."""

__all__ = ["core", "profile", "settings", "verify"]
