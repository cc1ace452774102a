"""Tokenizers of GGUF files: their ids are those of other programs for the same file, and text survives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from tiny_gguf import Kind
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf import gguf_tokenizer_mapping as reference

from shared.errors import ModelError
from shared.models.convert import convert_gguf
from shared.models.folder import ModelFolder
from shared.models.gguf_file import GgufFile
from shared.models.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_of
from shared.models.text import Tokenizer

TEXTS = [
    "Hello, world! It's 2024, and I'VE 12345 reasons   to   wait...\n\n\tdef f(x):\r\n        return x/2  # a/b\n",
    " leading and trailing ",
    "naïve Ελληνικά ΑΒΓαβγ CamelCaseWord don'T 漢字 и кириллица 1٣½ 🙂🙃 ﬁ",
    "x\n \n  y    \n",
    "",
]
CONTROL = ["<unk>", "<s>", "</s>", "<|end|>"]
DEFINED = ["  ", "    ", "<think>"]


def merged(normalizer: Any, pre_tokenizer: Any, alphabet: list[str]) -> tuple[list[str], list[str]]:
    """Tokens and merges learnt from the texts, across the bounds of words."""
    backend = Backend(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet, min_frequency=1)
    backend.train_from_iterator(TEXTS, trainer)
    vocab = backend.get_vocab()
    merges = json.loads(backend.to_str())["model"]["merges"]
    return sorted(vocab, key=vocab.__getitem__), [" ".join(pair) for pair in merges]


def write(path: Path, architecture: str, metadata: dict[str, Any]) -> Path:
    """A model whose tokenizer has this metadata."""
    size = len(metadata["tokenizer.ggml.tokens"])
    weights = tiny_gguf.tensors()
    weights["token_embd.weight"] = weights["token_embd.weight"].repeat(-(-size // tiny_gguf.VOCAB), 0)[:size]
    old = ("tokens", "token_type", "merges", "model", "pre")
    changes = {f"tokenizer.ggml.{key}": metadata.pop(f"tokenizer.ggml.{key}", None) for key in old}
    changes["tokenizer.ggml.eos_token_id"] = None
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return tiny_gguf.write(
        path, weights, lambda name: Kind.F32, architecture=architecture, changes=changes, added=metadata
    )


def byte_level(path: Path, pre: str, **other: Any) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = merged(None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), letters)
    return write(
        path,
        "llama",
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*CONTROL, *tokens, "<think>"],
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * len(tokens) + [4],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            **other,
        },
    )


def sentencepiece(path: Path, architecture: str, **other: Any) -> Path:
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens, _merges = merged(spaces, None, [])
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    found = [*CONTROL, *letters, *DEFINED, *tokens]
    return write(
        path,
        architecture,
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": found,
            "tokenizer.ggml.token_type": [2, 3, 3, 3] + [6] * len(letters) + [4] * len(DEFINED) + [1] * len(tokens),
            "tokenizer.ggml.scores": [
                0.0 if index < 260 + len(DEFINED) else -float(index) for index in range(len(found))
            ],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            **other,
        },
    )


def folder_of(path: Path) -> ModelFolder:
    folder = path.with_suffix("")
    folder.mkdir()
    convert_gguf(path, folder, lambda doing, share: None)
    return ModelFolder(folder)


def pairs_of_texts(path: Path, pre: str) -> Iterator[tuple[Tokenizer, str, list[int]]]:
    """The tokenizer with each text and transformers' ids of it."""
    architecture, metadata, _config = reference.get_gguf_tokenizer(str(path))
    backend, _ = reference.convert_gguf_tokenizer(architecture, metadata)
    # transformers merges words that are tokens, where the models' own tokenizers take them whole.
    model: Any = backend.model
    model.ignore_merges = PRE_TOKENIZERS[pre].ignores_merges
    tokenizer = Tokenizer(folder_of(path))
    for text in [*TEXTS, "a<think>b  c</s> d"]:
        yield tokenizer, text, backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", sorted({*PRE_TOKENIZERS} & {*reference.GGUF_PRE_TOKENIZER_SPLITS, "gpt-2"}))
def test_byte_level_ids_are_those_of_transformers(pre: str, tmp_path: Path) -> None:
    found = {}
    for tokenizer, text, expected in pairs_of_texts(byte_level(tmp_path / "model.gguf", pre), pre):
        assert tokenizer.encode_part(text) == expected
        assert tokenizer.decode(tokenizer.encode_part(text)) == text.replace("</s>", "")
        found[text] = tokenizer.encode(text)
    assert (found[TEXTS[0]][0] == 1) == PRE_TOKENIZERS[pre].adds_bos


def by_scores(text: str, scores: dict[str, float], prefix: str) -> list[str]:
    """SentencePiece's algorithm: join the neighbours that make the best token, the leftmost first."""
    pieces = list((prefix + text).replace(" ", "▁"))
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]:
        _score, place = min(pairs)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return pieces


@pytest.mark.parametrize(("architecture", "prefix"), [("llama", "▁"), ("gemma", "")])
def test_sentencepiece_ids_follow_from_the_scores(architecture: str, prefix: str, tmp_path: Path) -> None:
    """Of texts between tokens that the user has defined, as in llama.cpp."""
    path = sentencepiece(tmp_path / "model.gguf", architecture, **{"tokenizer.ggml.add_space_prefix": bool(prefix)})
    file, tokenizer = GgufFile(path), Tokenizer(folder_of(path))
    tokens, kinds = file.texts("tokenizer.ggml.tokens"), file.wholes("tokenizer.ggml.token_type")
    scores = {
        token: score
        for token, kind, score in zip(tokens, kinds, file.fields["tokenizer.ggml.scores"], strict=True)
        if kind == 1
    }
    for text in [*TEXTS, "a<think>b  d x"]:
        expected = []
        for part in re.split(f"({'|'.join(sorted(DEFINED, key=len, reverse=True))})", text):
            expected += [part] if part in DEFINED else by_scores(part, scores, prefix) if part else []
        assert tokenizer.encode_part(text) == [tokens.index(piece) for piece in expected]
        assert tokenizer.encode(text)[0] == 1
        if not re.search("|".join(DEFINED), text):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("\x07ő")) == "\x07ő"  # by bytes


def test_an_unknown_tokenizer_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"The pre-tokenizer 'deepseek-coder' is not known here \(smollm, "):
        folder_of(byte_level(tmp_path / "pre.gguf", "deepseek-coder"))
    with pytest.raises(ModelError, match="has a rwkv tokenizer; gpt2 and llama can be converted"):
        folder_of(byte_level(tmp_path / "kind.gguf", "gpt-2", **{"tokenizer.ggml.model": "rwkv"}))
    with pytest.raises(ModelError, match=r"the tokenizer changes texts \(tokenizer.ggml.remove_extra_whitespaces\)"):
        folder_of(sentencepiece(tmp_path / "spaces.gguf", "llama", **{"tokenizer.ggml.remove_extra_whitespaces": True}))
    with pytest.raises(ModelError, match="ends every text"):
        folder_of(byte_level(tmp_path / "eos.gguf", "gpt-2", **{"tokenizer.ggml.add_eos_token": True}))


def test_the_end_of_a_turn_ends_an_answer_too(tmp_path: Path) -> None:
    assert folder_of(byte_level(tmp_path / "text.gguf", "qwen2")).eos_ids == (2, CONTROL.index("<|end|>"))
    named = byte_level(tmp_path / "named.gguf", "qwen2", **{"tokenizer.ggml.eot_token_id": 0})
    assert folder_of(named).eos_ids == (2, 3, 0)
    unnamed = byte_level(tmp_path / "unnamed.gguf", "qwen2", **{"tokenizer.ggml.eos_token_id": None})
    assert folder_of(unnamed).eos_ids == (3,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": [], "token_type": []}, "has an empty vocabulary"),
        ({"scores": None}, "has no metadata tokenizer.ggml.scores"),
        ({"scores": ["-1"]}, "tokenizer.ggml.scores is ['-1'], not an array of numbers"),
        ({"scores": [float("nan")]}, "tokenizer.ggml.scores is [nan], not an array of numbers"),
        ({"scores": [-1.0]}, "tokens, and 1 scores"),
        ({"tokens": ["x" * 2000], "token_type": [1], "scores": [0.0]}, "has a token of 2000 characters"),
    ],
)
def test_an_unusable_vocabulary_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = GgufFile(sentencepiece(tmp_path / "model.gguf", "llama"))
    file.fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelError, match=re.escape(reason)):
        tokenizer_of(file)
