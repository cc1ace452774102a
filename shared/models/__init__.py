"""Models on disk: folder, tokenizer, chat template and conversion, without torch where the weights are not needed."""

__all__ = ["folder", "hidden_states", "prepare", "stop", "text"]
