"""A GGUF file's vocabulary as Hugging Face's `tokenizer.json` and `tokenizer_config.json`.

Two kinds of tokenizers: byte-level BPE ("gpt2"), whose pre-tokenizer GGUF only names, and SentencePiece's BPE
("llama"), whose merges follow from the tokens' scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shared.errors import ModelError
from shared.models.gguf_config import CONTROL_TOKEN, special_tokens
from shared.models.gguf_file import GgufFile

_OTHER_SOURCE = "Give the model's Hugging Face folder instead."
# llama.cpp's other types of tokens.
_NORMAL_TOKEN, _USER_DEFINED_TOKEN = 1, 4
_SPACE = "▁"
_LONGEST = 1024
"""Most characters of a token whose merges are looked for, which takes the square of their number."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_PATHS_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A pre-tokenizer, which GGUF only names (`tokenizer.ggml.pre`)."""

    pattern: str = ""
    """Splits a text into words; empty for GPT-2's own."""
    separates_digits: bool = False
    ignores_merges: bool = False
    """True if a word that is a token is that token, whatever the merges."""
    adds_bos: bool = False
    """True if texts begin with the first token unless the file says otherwise."""
    normalizer: str | None = None
    """Type of the tokenizer's normalizer."""


_LLAMA3 = PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignores_merges=True, adds_bos=True)
_CL100K = PreTokenizer(_LLAMA3.pattern)
_DIGITS = PreTokenizer(separates_digits=True)

PRE_TOKENIZERS: Final = {
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "gpt-2": PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _CL100K,
    "qwen2": PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", normalizer="NFC"),
    "tekken": PreTokenizer(
        rf"{_CASED_WORDS % ('', '')}|\p{{N}}|{_PATHS_REST}", ignores_merges=True, adds_bos=True
    ),
    "gpt-4o": PreTokenizer(
        rf"{_CASED_WORDS % (f'{_CONTRACTIONS}?', f'{_CONTRACTIONS}?')}|\p{{N}}{{1,3}}|{_PATHS_REST}"
    ),
}  # fmt: skip


def tokenizer_of(file: GgufFile) -> dict[str, Any]:
    """Return tokenizer.json. Raises ModelError for a tokenizer that is not known here."""
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path} has a {kind} tokenizer; gpt2 and llama can be converted. {_OTHER_SOURCE}")
    tokens, kinds = file.texts("tokenizer.ggml.tokens"), file.wholes("tokenizer.ggml.token_type")
    if len(tokens) != len(kinds):
        raise ModelError(
            f"{file.path} has {len(tokens)} tokens, and types for {len(kinds)} (tokenizer.ggml.token_type). "
            "Download the file again."
        )
    if not tokens:
        raise ModelError(f"{file.path} has an empty vocabulary (tokenizer.ggml.tokens). Download the file again.")
    if len(set(tokens)) < len(tokens):
        token, times = Counter(tokens).most_common(1)[0]
        raise ModelError(
            f"{file.path} has the token {token[:40]!r} {times} times (tokenizer.ggml.tokens). Download the file again, "
            "or give the model's Hugging Face folder instead."
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(file, tokens, kinds),
        **(_byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, kinds)),
    }


def tokenizer_config_of(file: GgufFile) -> dict[str, Any]:
    """Return tokenizer_config.json, with the template of conversations."""
    tokens = file.texts("tokenizer.ggml.tokens")
    special = {f"{name}_token": tokens[index] for name, index in special_tokens(file).items()}
    template = file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file.fields else None
    return {
        # Takes tokenizer.json as it is; GPT2Tokenizer would rebuild the pre-tokenizer without its digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": file.flag("tokenizer.ggml.add_space_prefix", False),
        **special,
        "additional_special_tokens": [special[name] for name in ("bos_token", "eos_token") if name in special],
        **({} if template is None else {"chat_template": template}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.whole(f"{file.text('general.architecture')}.context_length"),
    }


def _added(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the tokens that stand for their text wherever it occurs: control tokens, and those defined by the user."""
    # Phi-3's control tokens swallow the white space behind them, except these; llama.cpp knows that, too.
    keeps = {"<unk>", "<s>", "<|endoftext|>"}
    swallows = file.text("general.architecture") == "phi3" and file.text("tokenizer.ggml.model") == "llama"
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": swallows and kind == CONTROL_TOKEN and token not in keeps,
            "normalized": False,
            "special": kind == CONTROL_TOKEN,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL_TOKEN, _USER_DEFINED_TOKEN)
    ]


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    name = file.text("tokenizer.ggml.pre", "")
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"The pre-tokenizer {name!r} is not known here ({', '.join(PRE_TOKENIZERS)} are). {_OTHER_SOURCE}"
        )
    pre = PRE_TOKENIZERS[name]
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre.separates_digits else []
    if pre.pattern:
        split = {"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False}
        steps.append(split)
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pre.pattern})
    return {
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _post_processor(file, tokens, adds_bos=pre.adds_bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignores_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": file.texts("tokenizer.ggml.merges"),
        },
    }


def _sentencepiece(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if file.fields.get(key):
            raise ModelError(
                f"{file.path}: the tokenizer changes texts ({key}), which is not converted. {_OTHER_SOURCE}"
            )
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelError(
            f"{file.path} has {len(tokens)} tokens, and {len(scores)} scores (tokenizer.ggml.scores). "
            "Download the file again."
        )
    if (longest := max(map(len, tokens))) > _LONGEST:
        raise ModelError(
            f"{file.path} has a token of {longest} characters; at most {_LONGEST} can be converted. {_OTHER_SOURCE}"
        )
    prefixed = file.flag("tokenizer.ggml.add_space_prefix", True)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        # llama.cpp puts a space before each part of a text between control tokens.
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replaced]}
        if prefixed
        else replaced,
        "pre_tokenizer": None,
        "post_processor": _post_processor(file, tokens, adds_bos=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[special_tokens(file).get("unk", 0)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(tokens, kinds, scores),
        },
    }


def _merges(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> list[str]:
    """Return the merges that make SentencePiece's tokens: every pair of tokens that is one, the best score first.

    Pairs of one token are in the order of transformers' `generate_merges`.
    """
    normal = {token: score for token, kind, score in zip(tokens, kinds, scores, strict=True) if kind == _NORMAL_TOKEN}
    found = [
        (-score, -end, f"{token[:end]} {token[end:]}")
        for token, score in normal.items()
        for end in range(1, len(token))
        if token[:end] in normal and token[end:] in normal
    ]
    return [pair for *_, pair in sorted(found)]


def _post_processor(file: GgufFile, tokens: Sequence[str], *, adds_bos: bool) -> dict[str, Any] | None:
    """Return the step that puts the first token before a text. adds_bos: unless the file says otherwise."""
    if file.flag("tokenizer.ggml.add_eos_token", False):
        raise ModelError(f"{file.path}: the tokenizer ends every text (add_eos_token), so none can be continued.")
    if not file.flag("tokenizer.ggml.add_bos_token", adds_bos):
        return None
    if (bos := special_tokens(file).get("bos")) is None:
        raise ModelError(
            f"{file.path}: texts begin with a token that the file does not name (tokenizer.ggml.bos_token_id). "
            "Download the file again."
        )
    begin = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }
