"""What services need to know of a model without loading it: its folder, its tokenizer, its chat template."""

__all__ = ["folder", "hidden_states", "prepare", "stop", "text"]
