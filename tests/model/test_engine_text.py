"""Greedy text in float32 is what transformers' own `generate` writes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from shared.engine import Engine, Step

NEW_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Question: What is 12 + 30?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|im_start|>user\nName three planets.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4, 5,",
    "SELECT name, age FROM",
    "La Révolution française a commencé en",
    "Der schnelle braune Fuchs",
    '{"name": "Alice", "age":',
    "# Shopping list\n- milk\n- bread\n-",
    "In physics, the second law of thermodynamics states that",
    "To be, or not to be,",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "import numpy as np\n\nx = np.",
    "The recipe needs flour, sugar and",
    "Breaking news: scientists have",
    "A",
    "Summary. The committee met on Tuesday to discuss the budget for the next year. It was decided that " * 6,
]


def test_float32_greedy_text_equals_generate(target_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    engine = Engine(target_folder, dtype="float32", budget_tokens=8192)
    texts = [list(prompt) for prompt in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    for i, text in enumerate(texts):
        engine.attach(str(i), text)
    for _ in range(NEW_TOKENS):
        steps = [Step(str(i), text[engine.cached(str(i)) :]) for i, text in enumerate(texts)]
        best = engine.forward(steps).logits.topk(2)
        for i, text in enumerate(texts):
            text.append(int(best.indices[i, 0]))
            margins[i].append(float(best.values[i, 0] - best.values[i, 1]))

    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    longest = max(map(len, prompts))
    written = model.generate(
        torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,  # go on past the end of text, as the engine does
        pad_token_id=0,
    )[:, longest:].tolist()
    differences = []
    for prompt, text, theirs, margin in zip(prompts, texts, written, margins, strict=True):
        ours = text[len(prompt) :]
        assert len(ours) == len(theirs) == NEW_TOKENS
        at = next((i for i in range(NEW_TOKENS) if ours[i] != theirs[i]), None)
        if at is not None:
            differences.append(
                f"{tokenizer.decode(prompt)[:40]!r} token {at}: {ours[at]} instead of {theirs[at]}, "
                f"top-2 margin {margin[at]:.2g}"
            )
    assert not differences, "\n".join(differences)
