"""Grammars of completions: the tokens that may come next, as a function of the grammar and the tokens so far."""

__all__ = ["allowed", "build", "masks", "token_masks", "vocabulary"]
