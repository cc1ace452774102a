"""Verifier: owns the target model and its KV cache, verifies batches of drafts and commits what is accepted."""

__all__ = ["core", "engine_thread", "profile", "settings", "verify"]
