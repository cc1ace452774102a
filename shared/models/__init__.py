"""Models on disk: folder, description, tokenizer, chat template and conversion.

Only the checks of a packaged model's conversion need torch.
"""

__all__ = [
    "bfloat16",
    "description",
    "families",
    "folder",
    "generation",
    "gguf_file",
    "gguf_tensors",
    "hidden_states",
    "prepare",
    "rope",
    "safetensors_file",
    "shapes",
    "stop",
    "text",
    "weight_files",
]
