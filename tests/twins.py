"""Twins of tests: a measured profile of given coefficients, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

from services.tools.bench.support.tiny import EOS, byte_tokenizer
from shared.twin.folder import TwinFolder, write_twin
from shared.twin.spec import Acceptance

STEP_MS = 8.0


def profile_text(step_ms: float = STEP_MS, cache_tokens: int = 4096, token_ms: float = 0.1) -> str:
    """Return a measured profile: a fixed time for each step, and a time for each token."""
    coefficients = [step_ms, 0.0, token_ms, 0.0, 0.0, 0.0, token_ms]
    return json.dumps(
        {"kind": "measured", "description": "test", "cache_tokens": cache_tokens, "knee": 8}
        | {"coefficients": coefficients}
    )


def make_twin(folder: Path, *, acceptance: float = 0.75, **changes: float) -> TwinFolder:
    """Write a twin to a folder. changes: see `profile_text`."""
    words = folder / "words"
    size = byte_tokenizer(words)
    (words / "config.json").write_text(json.dumps({"vocab_size": size, "eos_token_id": EOS}))
    profile = folder / "profile.json"
    profile.write_text(profile_text(**changes))  # type: ignore[arg-type]
    return write_twin(str(profile), words, folder / "twin", Acceptance(mean=acceptance))
