"""Training: a draft model on the target model's own answers, and the controller on recorded rounds."""

__all__ = [
    "answering",
    "carried",
    "classifiers",
    "config",
    "controller",
    "evaluate",
    "generate",
    "prompts",
    "run",
    "shards",
    "train",
]
