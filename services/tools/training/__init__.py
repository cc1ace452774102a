"""Training of a draft model on the target model's own answers."""

__all__ = ["classifiers", "config", "controller", "evaluate", "generate", "prompts", "run", "shards", "train"]
