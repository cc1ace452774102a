"""Models on disk: folder, description, tokenizer, chat template and conversion.

Only conversion and its checks need torch."""

__all__ = [
    "description",
    "families",
    "folder",
    "gguf_file",
    "gguf_llama",
    "hidden_states",
    "prepare",
    "rope",
    "shapes",
    "stop",
    "text",
]
