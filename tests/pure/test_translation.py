"""Tokens of a draft model read as a target's with another vocabulary, and texts kept in the draft model's tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from services.drafter.core.own_tokens import OwnTokens
from services.drafter.core.translation import (
    LONGEST,
    Choices,
    Reading,
    ReadingChoices,
    Side,
    Translation,
    coverage,
    following,
)
from services.drafter.sources import pairing
from services.tools.bench.support import pair
from services.tools.cli.models_command import app
from services.tools.cli.stack_options import stack_for
from services.tools.local.service_commands import ServiceCommands
from services.tools.local.service_settings import refuse_bad_settings
from services.tools.local.settings import DEFAULT_TARGET
from shared.errors import ModelError, SettingsError
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

LINES = [
    "The international train leaves the station at 10:45.\n",
    "    return [each for each in internationals if each]\n",
    "Straßenbahn, señor, déjà vu — naïve façade…\n",
    "東京の天気は晴れです。🙂🙃 emoji and text\n",
]
KINDS = ("wide", "narrow", "pieces")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Side]:
    """A byte-level vocabulary with long tokens, one with short tokens of other texts, and one of SentencePiece."""
    folder = tmp_path_factory.mktemp("vocabularies")
    pair.byte_level(folder / "wide", LINES * 4, 520)
    pair.byte_level(folder / "narrow", LINES[:2], 300)
    pair.sentence_piece(folder / "pieces", LINES * 4, 460)
    sides = {}
    for name in KINDS:
        tokenizer = tokenizer_in(folder / name)
        ends = [tokenizer.special_tokens["</s>" if name == "pieces" else "<|end|>"]]
        sides[name] = Side(tokenizer, tokenizer.largest_id + 1, ends)
    return sides


def tokenizer_in(folder: Path) -> Tokenizer:
    return Tokenizer(cast("ModelFolder", SimpleNamespace(path=folder, chat_template=None)))


@pytest.fixture(scope="module", params=[(a, b) for a in KINDS for b in KINDS if a != b], ids="-".join)
def read(request: Any, vocabularies: dict[str, Side]) -> Translation:
    """The translation of each pair: draft, target."""
    draft, target = request.param
    return Translation(vocabularies[draft], vocabularies[target])


def joined(side: Side, tokens: Sequence[int]) -> bytes:
    return b"".join(side.vocabulary.token_bytes(token) for token in tokens)


def text_tokens(side: Side, text: str) -> list[int]:
    return side.vocabulary.encode_plain(text)


def test_a_reading_has_the_bytes_of_its_token(read: Translation) -> None:
    words = [token for token in range(read.draft.size) if read.draft.vocabulary.token_bytes(token)]
    read_words = [token for token in words if read.paths[token]]
    assert all(joined(read.target, read.paths[token]) == joined(read.draft, [token]) for token in read_words)
    unread = {joined(read.draft, [token]) for token in words} - {joined(read.draft, [token]) for token in read_words}
    for piece in unread:
        if len(piece) <= LONGEST:
            with pytest.raises(UnicodeDecodeError):
                piece.decode()


def test_tokens_of_texts_are_unread_only_if_they_are_long_for_the_target(read: Translation) -> None:
    for line in LINES:
        pieces = {joined(read.draft, [token]): read.paths[token] for token in text_tokens(read.draft, line)}
        assert any(pieces.values())
        for piece in (piece for piece, path in pieces.items() if not path):
            assert len(text_tokens(read.target, piece.decode())) > LONGEST


def test_ends_of_texts_stand_for_each_other(read: Translation) -> None:
    assert read.paths[read.draft.ends[0]] == (read.target.ends[0],)
    assert read.controls[read.target.ends[0]] == (read.draft.ends[0],)


def test_control_tokens_stand_for_those_of_the_same_text(vocabularies: dict[str, Side]) -> None:
    wide, narrow = vocabularies["wide"], vocabularies["narrow"]
    turn = narrow.vocabulary.special_tokens["<|turn|>"]
    same = Translation(wide, narrow)
    assert same.paths[wide.vocabulary.special_tokens["<|turn|>"]] == (turn,)
    assert same.controls[turn] == (wide.vocabulary.special_tokens["<|turn|>"],)
    other = Translation(vocabularies["pieces"], narrow)
    assert other.controls[turn] == ()
    assert other.paths[vocabularies["pieces"].vocabulary.special_tokens["<s>"]] == ()


def certain(read: Translation, token: int) -> Choices:
    """The choices of a draft model that is sure of its next token."""
    weights = np.full(read.draft.size, 1e-9, dtype=np.float32)
    weights[token] = 1
    return read.choices(weights)


def test_a_sure_draft_model_drafts_its_tokens_text(read: Translation) -> None:
    for token, path in enumerate(read.paths):
        if not path:
            continue
        at: Choices | Reading | None = certain(read, token)
        drafted = []
        while isinstance(at, Choices):
            drafted.append(int(at.columns.ids[at.logits.argmax()]))
            at = at.after(drafted[-1])
        assert tuple(drafted) == path
        assert isinstance(at, Reading)
        assert read.paths[at.token] == path, "the draft model goes on with this token, or one of the same bytes"


def test_weights_of_readings_with_one_beginning_are_added(vocabularies: dict[str, Side]) -> None:
    read = Translation(vocabularies["wide"], vocabularies["narrow"])
    weights = np.random.default_rng(0).random(read.draft.size).astype(np.float32)
    choices = read.choices(weights)
    for token, logit in zip(choices.columns.ids.tolist(), choices.logits.tolist(), strict=True):
        beginning = [each for each, path in enumerate(read.paths) if path[:1] == (token,)]
        assert np.exp(logit) == pytest.approx(weights[beginning].sum(), rel=1e-5)
    unread = [each for each, path in enumerate(read.paths) if not path]
    assert np.exp(choices.with_rest[-1]) == pytest.approx(weights[unread].sum(), rel=1e-3)


def test_the_likelier_of_an_end_and_of_longer_tokens_goes_on() -> None:
    short, long, longer = Reading((5,), 0.5, 1), Reading((5, 6), 0.3, 2), Reading((5, 7, 8), 0.1, 3)
    assert following([short, long, longer]) == short
    choices = following([Reading((5,), 0.3, 1), long, longer])
    assert isinstance(choices, ReadingChoices)
    assert choices.columns.ids.tolist() == [6, 7]
    assert following([]) is None


def test_a_token_that_nothing_begins_with_ends_the_draft(vocabularies: dict[str, Side]) -> None:
    read = Translation(vocabularies["narrow"], vocabularies["wide"])
    unreachable = sorted(set(range(read.target.size)) - set(read.columns.ids.tolist()))
    assert unreachable
    assert certain(read, int(read.order[0])).after(unreachable[0]) is None


ALPHABET = st.sampled_from([*"abc tion\n.", " international", "  ", "é", "東京", "🙂", "…", "\x00", "<|end|>", "▁"])


@settings(deadline=None, max_examples=25)
@given(parts=st.lists(ALPHABET, max_size=60), seed=st.integers(0, 99))
def test_a_growing_text_has_the_tokens_of_the_whole_text(read: Translation, parts: list[str], seed: int) -> None:
    target = text_tokens(read.target, "".join(parts))
    own, chosen = OwnTokens(read), random.Random(seed)
    length = 0
    while length < len(target):
        length = min(len(target), length + chosen.randint(1, 6))
        own.follow(target[:length])
    whole = joined(read.target, target)
    assert own.partial == b""
    assert own.tokens == text_tokens(read.draft, whole.decode())


@settings(deadline=None, max_examples=25)
@given(tokens=st.lists(st.integers(0, 10**6), max_size=80), seed=st.integers(0, 99))
def test_any_tokens_give_the_tokens_of_their_text(read: Translation, tokens: list[int], seed: int) -> None:
    """Bytes that are no text become U+FFFD, and an incomplete character at the end waits."""
    target = [token % read.target.size for token in tokens]
    target = [token for token in target if token not in read.controls]
    own, chosen = OwnTokens(read), random.Random(seed)
    for length in sorted(chosen.sample(range(len(target) + 1), min(5, len(target) + 1))):
        own.follow(target[:length])
    own.follow(target)
    whole = joined(read.target, target)
    complete = whole[: len(whole) - len(own.partial)].decode("utf-8", "replace")
    # SentencePiece puts a space before a text.
    assert joined(read.draft, own.tokens).decode() in (complete, f" {complete}")


def test_tokens_that_were_taken_back_leave_no_trace(read: Translation) -> None:
    first, second = (text_tokens(read.target, line * 5) for line in LINES[:2])
    own, fresh = OwnTokens(read), OwnTokens(read)
    own.follow(first)
    own.follow([*first[:9], *second])
    fresh.follow([*first[:9], *second])
    assert own.tokens == fresh.tokens


def test_control_tokens_separate_texts(read: Translation) -> None:
    own = OwnTokens(read)
    hello, world = text_tokens(read.target, "The train"), text_tokens(read.target, "The station")
    own.follow([*hello, read.target.ends[0], *world])
    text = joined(read.target, hello).decode()
    expected = [*text_tokens(read.draft, text), read.draft.ends[0]]
    assert own.tokens[: len(expected)] == expected
    assert b"station" in joined(read.draft, own.tokens[len(expected) :])


def test_a_text_begins_with_the_draft_models_own_token(vocabularies: dict[str, Side]) -> None:
    pieces = vocabularies["pieces"]
    begin = pieces.vocabulary.special_tokens["<s>"]
    read = Translation(Side(pieces.vocabulary, pieces.size, pieces.ends, (begin,)), vocabularies["wide"])
    own = OwnTokens(read)
    own.follow([read.target.ends[0], *text_tokens(read.target, "The train")])
    assert own.tokens == [begin, *text_tokens(pieces, "The train")]


def test_a_longer_token_may_begin_with_the_end_of_the_text(vocabularies: dict[str, Side]) -> None:
    """The target's tokens are shorter: its text ends inside a token of the draft model."""
    read = Translation(vocabularies["wide"], vocabularies["narrow"])
    token, path = max(enumerate(read.paths), key=lambda each: len(each[1]))
    assert len(path) > 2
    own = OwnTokens(read)
    own.follow([*text_tokens(read.target, "The train leaves"), *path[:-1]])
    ended = own.begun()
    assert path[:-1][-len(ended) :] == ended
    opened = read.opened(path[:-1])
    assert token in opened.tolist()
    weights = np.zeros(read.draft.size, dtype=np.float32)
    weights[token] = 0.25
    [reading] = read.open_readings(path[:-1], weights, 0.1, kept=7)
    assert (reading.path, reading.token, reading.weight, reading.kept) == (path[-1:], token, 0.25, 7)
    choices = read.choices(np.full(read.draft.size, 1e-6, dtype=np.float32), [reading])
    assert int(choices.columns.ids[choices.logits.argmax()]) == path[-1]
    assert choices.after(path[-1]) == reading


def test_an_incomplete_character_can_be_completed(vocabularies: dict[str, Side]) -> None:
    read = Translation(vocabularies["wide"], vocabularies["narrow"])
    characters = [character for line in LINES for character in line if not character.isascii()]
    pieces = {joined(read.draft, [each]): each for each, path in enumerate(read.paths) if len(path) > 1}
    piece = next(character.encode() for character in characters if character.encode() in pieces)
    token, path = pieces[piece], read.paths[pieces[piece]]
    own = OwnTokens(read)
    own.follow([*text_tokens(read.target, "emoji"), *path[:-1]])
    assert own.partial == piece[:-1]
    assert own.begun() == path[:-1]
    assert token in read.opened(own.begun()).tolist()


def test_a_vocabulary_covers_itself_and_shorter_tokens(vocabularies: dict[str, Side]) -> None:
    wide, narrow = vocabularies["wide"].vocabulary, vocabularies["narrow"].vocabulary
    text = "".join(LINES)
    assert coverage(wide, wide, text) == 1
    assert coverage(wide, narrow, text) > coverage(narrow, wide, text)
    assert coverage(wide, narrow, "") == 0


def model_folder(folder: Path, files: Sequence[str], size: int) -> Path:
    vocab_size = pair.byte_level(folder, files, size)
    (folder / "config.json").write_text(f'{{"vocab_size": {vocab_size}}}')
    (folder / "model.safetensors").touch()
    return folder


def test_a_draft_model_with_too_few_common_tokens_is_refused(tmp_path: Path) -> None:
    text = [pairing.SAMPLE.read_text(encoding="utf-8")]
    target = ModelFolder(model_folder(tmp_path / "target", text, 1000))
    assert pairing.covered(ModelFolder(model_folder(tmp_path / "same", text, 1000)), target) is None
    share = pairing.covered(ModelFolder(model_folder(tmp_path / "similar", text, 900)), target)
    assert share is not None
    assert pairing.LEAST_COVERAGE < share < 1
    bytes_only = ModelFolder(model_folder(tmp_path / "bytes", [], 0))
    with pytest.raises(ModelError, match=r"bytes splits text too differently .* \d+% .*lookup"):
        pairing.covered(bytes_only, target)


def test_a_stack_refuses_such_a_draft_model_before_it_starts(tmp_path: Path) -> None:
    text = [pairing.SAMPLE.read_text(encoding="utf-8")]
    target = model_folder(tmp_path / "target", text, 1000)
    commands = ServiceCommands(
        namespace="n",
        amqp_url="amqp://here/",
        redis_url="redis://here/",
        target=target,
        host="127.0.0.1",
        port=0,
        verifiers=1,
        serving="wisp",
        env={"WISP_DRAFT_MODEL": str(model_folder(tmp_path / "bytes", [], 0))},
    )
    with pytest.raises(SettingsError, match=r"WISP_DRAFT_MODEL: the draft model .* splits text too differently"):
        refuse_bad_settings(commands, {"drafter": {}})
    commands.env["WISP_DRAFT_MODEL"] = str(model_folder(tmp_path / "similar", text, 900))
    refuse_bad_settings(commands, {"drafter": {}})


def test_a_draft_model_is_compared_with_the_target_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [pairing.SAMPLE.read_text(encoding="utf-8")]
    default = model_folder(tmp_path / "models" / DEFAULT_TARGET, text, 1000)
    target, draft = (model_folder(tmp_path / name, [], 0) for name in ("target", "draft"))
    monkeypatch.setattr("services.tools.local.stack.state_folder", lambda: tmp_path)
    monkeypatch.setattr("services.tools.local.target.prepare_target", lambda name, progress: Path(name))
    stack_for("up", str(target), None, "model", draft, None, None).refuse_bad_settings()
    with pytest.raises(SettingsError, match="splits text too differently"):
        stack_for("up", str(default), None, "model", draft, None, None).refuse_bad_settings()


def test_models_check_names_what_a_draft_model_covers(tmp_path: Path) -> None:
    text = [pairing.SAMPLE.read_text(encoding="utf-8")]
    target = str(model_folder(tmp_path / "target", text, 1000))
    similar, bytes_only = model_folder(tmp_path / "similar", text, 900), model_folder(tmp_path / "bytes", [], 0)
    shown = CliRunner().invoke(app, ["check", target, "--draft-model", str(similar)])
    assert re.search(r"similar has another vocabulary\. Its drafts can contain \d+% of the tokens", shown.output)
    refused = CliRunner().invoke(app, ["check", target, "--draft-model", str(bytes_only)])
    assert refused.exit_code == 1
    assert "too differently" in refused.output
