"""The prompt corpus: every template can be filled, and held-out prompts share nothing with training prompts."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from services.tools.training.prompts import FINAL, Corpus, HeldOut, corpus, free_text, sample

KINDS = {
    "business",
    "chat",
    "code",
    "completion",
    "explain",
    "list",
    "math",
    "multiturn",
    "rewrite",
    "story",
    "summary",
}
LISTS = {"city": ["Rome", "Oslo"], "job": ["actor", "baker"], "said": ["I live in {city}."]}


def made(*entries: dict[str, object], lists: dict[str, list[str]] = LISTS) -> Corpus:
    return Corpus([{"kind": "note", "template": list(entries)}], lists)


def rendered(of: Corpus, count: int, held_out: HeldOut = False) -> list[str]:
    prompts = of.sample(0, count, held_out)
    return [prompt.text or "\n".join(turn.content for turn in prompt.turns or ()) for prompt in prompts]


def test_every_packaged_template_can_be_filled() -> None:
    packaged = corpus()
    rng = random.Random(0)
    slots = re.compile(r"\{[A-Za-z_]+\d*\}")
    for template in packaged.templates.values():
        prompt = packaged.render(template, rng)
        contents = [turn.content for turn in prompt.turns] if prompt.turns else [prompt.text or ""]
        assert all(content.strip() and not slots.search(content) for content in contents), template.id
        assert (prompt.turns is None) == (prompt.kind == "completion")
        assert prompt.turns is None or prompt.turns[-1].role == "user"


def test_every_kind_has_training_and_held_out_templates() -> None:
    counts = Counter((template.kind, template.held_out) for template in corpus().templates.values())
    assert {kind for kind, _ in counts} == KINDS
    assert all(counts[kind, False] >= 20 and counts[kind, True] >= 5 and counts[kind, FINAL] >= 3 for kind in KINDS)


def test_held_out_prompts_share_no_templates_or_fillers_with_training() -> None:
    packaged = corpus()
    splits: tuple[HeldOut, ...] = (False, True, FINAL)
    drawn = [{prompt.template for prompt in sample(1, 400, held_out=split)} for split in splits]
    assert len(set().union(*drawn)) == sum(map(len, drawn))
    for name in ("topic", "task", "problem", "sentence", "city", "name", "news_b", "snippet"):
        assert not set(packaged.fillers(name, held_out=False)) & set(packaged.fillers(name, held_out=True))


def test_held_out_fillers_appear_in_held_out_prompts_only() -> None:
    cities = {"city": [f"city-{letter}" for letter in "abcdefgh"]}
    both = made({"id": "t", "text": "{city}"}, {"id": "h", "text": "{city}", "held_out": True}, lists=cities)
    assert set(rendered(both, 6)) == {f"city-{letter}" for letter in "abcdef"}
    assert set(rendered(both, 2, held_out=True)) == {"city-g", "city-h"}


def test_final_templates_are_drawn_by_themselves_alone() -> None:
    cities = {"city": [f"city-{letter}" for letter in "abcdefgh"]}
    held_out = [{"id": "h", "text": "See {city}", "held_out": True}]
    final = {"held_out": "final", "template": [{"id": "f", "kind": "note", "text": "Leave {city}"}]}
    both = Corpus([{"kind": "note", "template": held_out}, final], cities)
    assert set(rendered(both, 2, held_out=FINAL)) == {"Leave city-g", "Leave city-h"}
    assert set(rendered(both, 2, held_out=True)) == {"See city-g", "See city-h"}
    with pytest.raises(ValueError, match="0 templates"):
        both.sample(0, 1, held_out=False)


def test_a_sample_depends_on_its_seed_alone() -> None:
    assert sample(3, 300, held_out=False) == sample(3, 300, held_out=False)
    assert sample(3, 300, held_out=False) != sample(4, 300, held_out=False)


def test_a_sample_has_distinct_prompts_of_each_template_in_turn() -> None:
    kinds = ("math", "list")
    prompts = sample(5, 500, held_out=False, kinds=kinds)
    assert len({prompt.turns for prompt in prompts}) == len(prompts) == 500
    assert {prompt.kind for prompt in prompts} == set(kinds)
    uses = Counter(prompt.template for prompt in prompts)
    assert max(uses.values()) - min(uses.values()) <= 1


def test_a_sample_beyond_the_templates_is_refused() -> None:
    with pytest.raises(ValueError, match="2 different prompts, not 3"):
        made({"id": "t", "text": "Where is {city}?"}).sample(0, 3, held_out=False)


def test_fillers_agree_with_each_other_and_with_the_sentence() -> None:
    text = "{city} {city2} {city}: a {job} and a {job2}. {Said}"
    for content in rendered(made({"id": "t", "text": text}), 4):
        first, second, third = content.split(":")[0].split()
        assert first == third != second
        assert "an actor" in content
        assert "a baker" in content
        assert content.endswith(f"I live in {first}.")


def test_other_braces_are_text() -> None:
    code = "f() { return {}; } {\n  1 }"
    assert rendered(made({"id": "t", "text": code}), 1) == [code]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "odd", "text": "Go to {planet}."}, "Template odd: there is no list for the slot planet"),
        ({"text": "Hello"}, "id and kind are needed"),
        ({"id": "odd"}, "Template odd: give it either text or turns"),
        ({"id": "odd", "turns": [{"role": "assistant", "content": "Hi"}]}, "Template odd: the last turn"),
        ({"id": "odd", "turns": [{"role": "tool", "content": "Hi"}]}, "Template odd: tool is no role"),
        ({"id": "odd", "text": "Hello", "held_out": "last"}, "Template odd: held_out is 'last'. Set it to true"),
    ],
)
def test_a_broken_template_is_named(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(entry)


def test_an_id_used_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="Template t: the id is used twice"):
        made({"id": "t", "text": "One"}, {"id": "t", "text": "Two"})


def test_a_filler_with_an_unknown_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="List said: there is no list for the slot planet"):
        made(lists={"said": ["On {planet}"]})


def test_lists_that_refer_to_each_other_in_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match="refer to themselves"):
        made({"id": "t", "text": "{a}"}, lists={"a": ["{b}"], "b": ["{a}"]}).sample(0, 1, held_out=False)


def test_free_text_has_lengths_in_the_range_and_is_repeatable() -> None:
    passages = free_text(2, 12)
    assert passages == free_text(2, 12)
    assert len(set(passages)) == len(passages) == 12
    assert all(600 <= len(passage.strip()) <= len(passage) <= 2000 for passage in passages)
