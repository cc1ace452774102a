"""Models on disk: folder, description, tokenizer, chat template and conversion.

Only conversion and its checks need torch."""

__all__ = ["description", "families", "folder", "hidden_states", "prepare", "rope", "stop", "text"]
