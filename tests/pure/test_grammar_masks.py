"""Masks of grammars: functions of the grammar and the tokens of the answer, on a small vocabulary of real merges."""

from __future__ import annotations

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from made_folders import sentence_piece, write_folder
from patience import HANG_S
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from shared.errors import GrammarError
from shared.grammar import allowed, build
from shared.grammar.allowed import AllowedTokens, Words
from shared.grammar.masks import Grammars, GrammarSession, TokenChain
from shared.grammar.token_masks import ChainMask, DraftMask
from shared.messages import Grammar, Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.sampling.rules import LogitsProcessor
from shared.sampling.sampler import Columns, choose_in_rows

EOS = 1
VOCAB = 700
"""More than the tokenizer has: rows of logits are often padded."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a b", "c\n", "é漢"]}, "maxItems": 3},
        "city": {"enum": ["Berlin", "Paris"]},
    },
    "required": ["name", "age", "tags", "city"],
}
TEXTS = {
    "schema": build.json_schema(SCHEMA),
    "object": build.json_object(),
    "regex": build.regex(r"[ab]{3,5}(-\d\d?)+x"),
    "choice": build.choice(["yes", "no", 'maybe "so"\n']),
    "lark": build.any_syntax('start: "a" ("b" | "c")* "d"'),
    "gbnf": build.any_syntax('root ::= "a" ("b" | "c")* "d"'),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary") / "model"
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = [json.dumps({"name": f"n{i}", "age": i, "city": "Berlin", "tags": ["a b"]}) for i in range(200)]
    backend.train_from_iterator([*samples, "the quick brown fox and the yes and the no " * 20], trainer)
    return Tokenizer(ModelFolder(write_folder(folder, backend, vocab_size=VOCAB)))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(lambda: tokenizer, VOCAB, [EOS])


def grammar(name: str) -> Grammar:
    return Grammar(text=TEXTS[name], prompt_len=0)


def ids_of(allowed: AllowedTokens) -> list[int]:
    """Return the tokens that may come next."""
    if allowed.only is not None:
        return [allowed.only]
    ids: list[int] = np.flatnonzero(allowed.flags).tolist()
    return ids


def walk(session: GrammarSession, chance: random.Random, longest: int = 80) -> list[int]:
    """Return the tokens of a random answer, its end included."""
    tokens: list[int] = []
    while len(tokens) < longest:
        ids = ids_of(session.after(tokens))
        assert ids, "there is always a token that may come next"
        tokens.append(chance.choice(ids))
        if tokens[-1] == EOS:
            break
    return tokens


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "object"])
def test_every_walk_through_the_masks_is_a_text_of_the_grammar(
    grammars: Grammars, tokenizer: Tokenizer, name: str
) -> None:
    ended = 0
    for seed in range(30):
        tokens = walk(grammars.session(f"walk{seed}", grammar(name)), random.Random(seed))
        if tokens[-1] != EOS:
            continue
        ended += 1
        text = tokenizer.decode(tokens[:-1])
        if name == "schema":
            value = json.loads(text)
            assert list(value) == list(SCHEMA["properties"])
            assert len(value["name"]) <= 6
            assert 0 <= value["age"] <= 150
            assert set(value["tags"]) <= {"a b", "c\n", "é漢"}
            assert value["city"] in ("Berlin", "Paris")
        elif name == "choice":
            assert text in ("yes", "no", 'maybe "so"\n')
        else:
            assert re.fullmatch("[ab]{3,5}(-[0-9][0-9]?)+x" if name == "regex" else "a[bc]*d", text)
    assert ended >= 20


@given(
    name=st.sampled_from(sorted(TEXTS)), seed=st.integers(0, 2**32), steps=st.integers(1, 30), tries=st.integers(0, 5)
)
def test_masks_depend_on_nothing_but_the_tokens(
    grammars: Grammars, name: str, seed: int, steps: int, tries: int
) -> None:
    """A state that went astray, back and on has the masks of a new one."""
    chance = random.Random(seed)
    used = grammars.session(f"used{seed}", grammar(name))
    tokens = walk(used, chance, steps)
    for _ in range(tries):
        astray = tokens[: chance.randint(0, len(tokens))]
        while len(astray) < steps + 4 and chance.random() < 0.8:
            astray.append(chance.choice(ids_of(used.after(astray))))
        if chance.random() < 0.4:
            with pytest.raises(GrammarError):
                used.after([*astray, VOCAB - 1])
    for length in (len(tokens), chance.randint(0, len(tokens))):
        fresh = grammars.session(f"fresh{seed}", grammar(name))
        mine, other = used.after(tokens[:length]), fresh.after(tokens[:length])
        grammars.forget(f"fresh{seed}")
        assert mine.forced == other.forced
        assert ids_of(mine) == ids_of(other)


@given(name=st.sampled_from(sorted(TEXTS)), seed=st.integers(0, 2**32), steps=st.integers(0, 30))
def test_a_token_is_looked_up_as_its_mask_has_it(grammars: Grammars, name: str, seed: int, steps: int) -> None:
    session = grammars.session(f"looked{seed}", grammar(name))
    tokens = walk(session, random.Random(seed), steps)
    allowed = session.after(tokens)
    looked_up = [token for token in range(VOCAB) if allowed.allows(token)]
    masked = session.after(tokens)
    assert looked_up == ids_of(masked)
    masked.prepare()
    assert looked_up == [token for token in range(VOCAB) if masked.allows(token)]
    assert not allowed.allows(VOCAB)
    assert not masked.allows(VOCAB)
    grammars.forget(f"looked{seed}")


def test_no_mask_is_computed_for_tokens_that_are_looked_up(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrammarSession, "_mask", lambda _: pytest.fail("a mask was computed"))
    session = grammars.session("lazy", grammar("schema"))
    tokens = tokenizer.encode('{"name": "Ada", "age": 3')
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, tokens[-1]] = 9
    for at in range(len(tokens)):
        chain = session.chain(tokens[:at], tokens[at:], 99, 0)
        assert chain.tokens == tokens[at:]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=5)):
        mask = ChainMask([session.after(tokens[:-1])])
        processor = LogitsProcessor.of(sampling, tokens[:-1], mask)
        assert choose_in_rows(logits, [sampling], [5], processors=[processor]) == [tokens[-1]]


def test_masks_are_computed_beside_a_pass_where_the_last_choice_needed_one(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, computed = list[str](), threading.Event()
    compute = GrammarSession._mask

    def mask(session: GrammarSession) -> Words:
        threads.append(threading.current_thread().name)
        words = compute(session)
        computed.set()
        return words

    def chosen(chain: TokenChain, token: int) -> list[int]:
        logits = np.zeros((1, VOCAB), dtype=np.float32)
        logits[0, token] = 9
        processor = LogitsProcessor.of(Sampling(), tokens[:-1], ChainMask(chain.allowed))
        return choose_in_rows(logits, [Sampling()], [5], processors=[processor])

    monkeypatch.setattr(GrammarSession, "_mask", mask)
    tokens = tokenizer.encode('{"name": "Ada", "age": 3')
    session = grammars.session("ahead", grammar("schema"))
    first, second, third = (session.chain(tokens[:-1], [], 99, 0) for _ in range(3))
    with grammars.masks_ahead([first, TokenChain([], 0, [])]):
        assert chosen(first, tokens[-1]) == [tokens[-1]]
    assert threads == [], "the choice needs none"
    assert chosen(second, EOS) != [EOS]
    computed.clear()
    with grammars.masks_ahead([third]):
        assert computed.wait(HANG_S)
    assert chosen(third, EOS) == chosen(second, EOS)
    assert [name.partition("_")[0] for name in threads] == ["MainThread", "masks"]


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    columns=st.booleans(),
    few=st.sampled_from([0, allowed.FEW]),
    ahead=st.booleans(),
)
def test_a_choice_is_the_one_that_its_mask_leaves(
    grammars: Grammars, seed: int, temperature: float, columns: bool, few: int, ahead: bool
) -> None:
    """The logits lean to allowed tokens, so that all ways of choosing are taken."""
    chance = random.Random(seed)
    name = f"choice{seed}"
    session = grammars.session(name, grammar("schema"))
    tokens = walk(session, chance, chance.randint(0, 20))
    row = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3
    row[ids_of(session.after(tokens))] += chance.choice([0.0, 3.0])
    ids = np.sort(np.random.default_rng(seed).permutation(VOCAB)[:400]) if columns else None
    kept = row if ids is None else row[ids]
    masked = kept.copy()
    session.after(tokens).apply(masked, ids)
    shown = None if ids is None else Columns.of(ids)
    sampling = Sampling(temperature=temperature, seed=seed % 2**62)
    place = session.after(tokens)
    processor = LogitsProcessor.of(sampling, tokens, ChainMask([place]))
    grammars.forget(name)
    if np.isfinite(masked.max()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(allowed, "FEW", few)
            if ahead:
                place.prepare()
            chosen = choose_in_rows(kept[None], [sampling], [7], shown, [processor])
        assert chosen == choose_in_rows(masked[None], [sampling], [7], shown)


def test_forced_text_has_the_tokenizers_own_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    session = grammars.session("forced", grammar("schema"))
    start = tokenizer.encode('{"name": "')
    forced = list(session.after([]).forced)
    assert len(forced) >= 2
    assert start[: len(forced)] == forced
    for at in range(len(forced)):
        assert list(session.after(forced[:at]).forced) == forced[at:]
        assert ids_of(session.after(forced[:at])) == forced[at : at + 1]
        with pytest.raises(GrammarError, match="not allowed at position"):
            session.after([*forced[:at], forced[at] + 1])


def test_a_complete_grammar_allows_the_end_only(grammars: Grammars, tokenizer: Tokenizer) -> None:
    session = grammars.session("ends", grammar("choice"))
    assert EOS not in ids_of(session.after([]))
    tokens = tokenizer.encode("yes")
    assert ids_of(session.after(tokens)) == [EOS]
    assert ids_of(session.after([*tokens, EOS])) == [EOS], "also behind it, where the end does not end the session"
    assert ids_of(session.after([*tokens, EOS, EOS])) == [EOS]
    assert EOS not in ids_of(session.after(tokens[:-1])), "and back again"
    with pytest.raises(GrammarError, match="before its grammar is complete"):
        session.after([*tokens[:-1], EOS])


@pytest.mark.parametrize("tokens", [[], [0], None])
@pytest.mark.parametrize("columns", [None, range(0, 600, 7), range(VOCAB)])
def test_logits_of_other_tokens_become_minus_infinity(
    grammars: Grammars, tokenizer: Tokenizer, tokens: list[int] | None, columns: Any
) -> None:
    session = grammars.session("logits", grammar("schema"))
    answer = tokenizer.encode('{"name": "x') if tokens is None else list(session.after([]).forced)[: len(tokens)]
    allowed = session.after(answer)
    ids = None if columns is None else np.array(columns)
    logits = np.random.default_rng(0).normal(size=VOCAB if ids is None else len(ids)).astype(np.float32)
    changed = logits.copy()
    allowed.apply(changed, ids)
    kept = np.isin(np.arange(VOCAB) if ids is None else ids, ids_of(allowed))
    assert (changed[kept] == logits[kept]).all()
    assert (changed[~kept] == -np.inf).all()
    for token in range(VOCAB):
        assert allowed.allows(token) == (token in ids_of(allowed))


def test_states_that_are_not_kept_are_rebuilt(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.grammar.masks.MOST_SESSIONS", 2)
    few = Grammars(lambda: tokenizer, VOCAB, [EOS])
    answers = {f"s{i}": walk(grammars.session(f"s{i}", grammar("schema")), random.Random(i), 20) for i in range(5)}
    for _ in range(2):
        for name, tokens in answers.items():
            mine = few.session(name, grammar("schema")).after(tokens)
            other = grammars.session(name, grammar("schema")).after(tokens)
            assert ids_of(mine) == ids_of(other)


def test_a_forgotten_session_begins_anew(grammars: Grammars) -> None:
    session = grammars.session("forgotten", grammar("schema"))
    assert grammars.session("forgotten", grammar("schema")) is session
    grammars.forget("forgotten")
    again = grammars.session("forgotten", grammar("schema"))
    assert again is not session
    assert ids_of(again.after([])) == ids_of(session.after([]))
    assert grammars.session("forgotten", grammar("choice")) is not again, "a state is of one grammar"


def test_a_session_is_forgotten_while_a_grammar_is_built(tokenizer: Tokenizer) -> None:
    begun, built = threading.Event(), threading.Event()

    def load() -> Tokenizer:
        begun.set()
        assert built.wait(HANG_S)
        return tokenizer

    slow = Grammars(load, VOCAB, [EOS])
    with ThreadPoolExecutor(1) as thread:
        building = thread.submit(slow.session, "ended", grammar("choice"))
        try:
            assert begun.wait(HANG_S)
            forgetting = threading.Thread(target=slow.forget, args=("ended",), daemon=True)
            forgetting.start()
            forgetting.join(5)
            assert not forgetting.is_alive(), "the event loop does not wait for another session's grammar"
        finally:
            built.set()
        session = building.result(HANG_S)
    assert slow.session("ended", grammar("choice")) is not session, "the state of an ended session is not kept"


def test_a_draft_has_masks_until_it_leaves_the_grammar(grammars: Grammars) -> None:
    whole = Grammar(text=TEXTS["schema"], prompt_len=3)
    forced = list(grammars.session("p", whole).after([]).forced)
    assert len(forced) > 2
    mask = DraftMask(grammars.session("p", whole), forced[:1])
    assert mask.only == forced[1]
    mask.push(forced[1])
    assert mask.only == forced[2]
    mask.push(VOCAB - 1)
    outside = [mask.only, mask.allowed]
    assert outside == [None, None], "no masks outside the grammar"


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (lambda: build.json_schema({"properties": {"a": {"type": "strin"}}}), r"^properties\.a: Invalid type: strin"),
        (
            lambda: build.json_schema({"items": {"anyOf": [{"type": "null"}, {"pattern": "[", "type": "string"}]}}),
            r"^items\.anyOf\[1\]: regex parse error",
        ),
        (lambda: build.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: build.json_schema({"type": "integer", "minimum": 10**30}), "the schema cannot be read: .*"),
        (lambda: build.check(build.regex("a(?=b)")), "look-around"),
        (lambda: build.check(build.any_syntax('start: "a" b')), "unknown name"),
        (lambda: build.check(build.any_syntax("???")), "neither Lark nor GBNF.*line 1"),
    ],
)
def test_an_error_names_the_bad_place_of_a_grammar(made: Any, problem: str) -> None:
    with pytest.raises(GrammarError, match=problem):
        made()


def test_a_grammar_that_needs_too_much_work_is_refused_at_its_check(grammars: Grammars) -> None:
    with pytest.raises(GrammarError):
        grammars.check(build.regex("(a{999}){1000}"))


def test_keywords_that_cannot_be_enforced_may_be_left_out(grammars: Grammars) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "unheard-of"}}
    grammars.check(build.json_schema(schema, strict=False))


def test_objects_have_the_properties_that_they_name(grammars: Grammars, tokenizer: Tokenizer) -> None:
    def allows(schema: dict[str, Any], text: str) -> bool:
        session = grammars.session("object", Grammar(text=build.json_schema(schema), prompt_len=0))
        try:
            session.after([*tokenizer.encode(text), EOS])
        except GrammarError:
            return False
        return True

    named = {"type": "object", "properties": {"a": {"type": "integer"}}}
    more = '{"a": 1, "b": 2}'
    assert allows(named, '{"a": 1}')
    assert not allows(named, more)
    assert allows(named | {"additionalProperties": True}, more)
    assert allows({"type": "object"}, more)
    assert allows(named | {"required": ["b"]}, more), "a schema that names a property only here is taken at its word"


def test_forced_text_has_no_space_of_its_own_in_sentence_piece_models(tmp_path: Path) -> None:
    """Their tokenizers put a space before each text, which is not there inside an answer."""
    tokenizer = Tokenizer(ModelFolder(write_folder(tmp_path / "model", sentence_piece())))
    grammars = Grammars(lambda: tokenizer, tokenizer.largest_id + 1, [EOS])
    session = grammars.session("s", Grammar(text=build.choice(["b the a", "b the b"]), prompt_len=0))
    tokens: list[int] = []
    while (only := session.after(tokens).only) is not None:
        tokens.append(only)
    assert b"".join(map(tokenizer.token_bytes, tokens)) in (b"b the", b"b the ")
    assert len(tokens) < len(b"b the"), "with the tokens of words, not of bytes"
    for seed in range(5):
        tokens = walk(session, random.Random(seed))
        assert b"".join(map(tokenizer.token_bytes, tokens)) in (b"b the a", b"b the b")


def test_a_chain_has_the_allowed_draft_and_the_forced_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    session = grammars.session("chain", grammar("schema"))
    head = list(session.after([]).forced)
    chain = session.chain([], [], 99, 99)
    assert (chain.tokens, chain.drafted, chain.certain) == (head, 0, len(head))
    assert len(chain.allowed) == len(head) + 1
    assert [chain.tokens for chain in (session.chain([], [], 2, 99), session.chain([], [], 99, 1))] == [
        head[:2],
        head[:1],
    ]
    chain = session.chain([], [*head[:1], head[0]], 99, 99)
    assert (chain.tokens, chain.drafted) == (head, 1), "a draft that leaves the grammar is cut"
    value = session.after(head)
    free = next(token for token in ids_of(value) if b'"' not in tokenizer.token_bytes(token))
    chain = session.chain(head[:1], [*head[1:], free, VOCAB - 1], 99, 0)
    assert (chain.tokens, chain.drafted, chain.certain) == ([*head[1:], free], len(head), len(head) - 1)
    assert [ids_of(allowed) for allowed in chain.allowed] == [
        ids_of(session.after([*head, free][: 1 + at])) for at in range(len(chain.allowed))
    ]


def test_nothing_is_certain_without_a_grammar() -> None:
    assert TokenChain([5, 6], 2, []).certain == 0


def test_a_chain_ends_where_the_answer_does(grammars: Grammars, tokenizer: Tokenizer) -> None:
    session = grammars.session("chain-end", grammar("choice"))
    tokens = tokenizer.encode("yes")
    chain = session.chain(tokens[:-1], [tokens[-1]], 99, 99, {EOS})
    assert chain.tokens == [tokens[-1], EOS]
    assert chain.drafted == 1
    assert len(chain.allowed) == 2


def test_a_model_without_an_end_of_text_has_no_grammars(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="end-of-text"):
        Grammars(lambda: tokenizer, VOCAB, []).check(TEXTS["choice"])
