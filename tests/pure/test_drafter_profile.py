"""Hardware profiles: their files, the drafting times that follow, and the delays of messages."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.drafter.core.profile import MOST_JITTER, HardwareProfile, LinkDelays, LinkProfile, parse_profile
from services.drafter.link import SHIPPED, load_profile
from services.drafter.sources import Draft
from shared.errors import SettingsError

GOOD = """
[draft]
step_ms = 4
prompt_ms = 0.5
[uplink]
delay_ms = 10
jitter_ms = 3
[downlink]
delay_ms = 5
"""


def test_a_profile_holds_the_figures_of_its_file() -> None:
    profile = parse_profile(GOOD, "p")
    assert (profile.draft.step_ms, profile.draft.prompt_ms) == (4, 0.5)
    assert (profile.uplink, profile.downlink) == (LinkProfile(delay_ms=10, jitter_ms=3), LinkProfile(delay_ms=5))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step_ms = 4\n", "", "draft.step_ms: is missing"),
        ("[downlink]\ndelay_ms = 5", "", "downlink: is missing"),
        ("step_ms = 4", "step_ms = -4", "draft.step_ms: must be 0 or more"),
        ("jitter_ms = 3", "jitter_ms = -1", "uplink.jitter_ms: must be 0 or more"),
        ("delay_ms = 10", "delay_ms = nan", "uplink.delay_ms: must be a finite number"),
        ("delay_ms = 10", "delay_ms = inf", "uplink.delay_ms: must be a finite number"),
        ("delay_ms = 10", 'delay_ms = "far"', "uplink.delay_ms: must be a number"),
        ("prompt_ms", "promt_ms", "draft.promt_ms: no such key"),
        ("[uplink]", "[uplink", "p is not TOML"),
    ],
)
def test_an_invalid_file_is_refused_with_the_reason(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError) as refused:
        parse_profile(GOOD.replace(old, new, 1), "p")
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000, "a = 1979-99-99", "\0"])
def test_text_that_is_not_toml_is_one_line_of_error(text: str) -> None:
    with pytest.raises(SettingsError, match="hardware profile p is not TOML") as refused:
        parse_profile(text, "p")
    assert "\n" not in str(refused.value)


def test_profiles_load_by_name_or_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    assert load_profile("") is None
    assert load_profile(str(tmp_path / "mine.toml")) == parse_profile(GOOD, "mine")
    with pytest.raises(SettingsError, match=r"no hardware profile toaster .*raspberry-pi-5.*WISP_DEVICE_PROFILE"):
        load_profile("toaster")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="no hardware profile"):
        load_profile(str(tmp_path / "binary"))


@pytest.mark.parametrize("name", ["raspberry-pi-5", "jetson-orin-nano", "laptop", "phone"])
def test_shipped_profiles_are_sound_and_give_the_source_of_each_figure(name: str) -> None:
    profile = load_profile(name)
    assert profile is not None
    assert profile.description
    assert 0 < profile.draft.prompt_ms < profile.draft.step_ms
    lines = (SHIPPED / f"{name}.toml").read_text().splitlines()
    for figure in ("step_ms", "prompt_ms", "[uplink]"):
        (line_number,) = (i for i, line in enumerate(lines) if line.startswith(figure))
        assert lines[line_number - 1].startswith("# ")


def test_the_time_of_a_draft_includes_its_steps_and_the_tokens_before_it() -> None:
    profile = parse_profile(GOOD, "p")
    assert profile.draft_ms(Draft([5, 6], {"hidden": 3}, computed=1)) == 12
    assert profile.draft_ms(Draft([5], {"hidden": 1}, computed=101)) == 4 + 50
    assert profile.draft_ms(Draft([5, 6, 7])) == 0, "copied tokens take no time"
    prepared = [Draft([5], {"hidden": 2}), Draft([6], {"hidden": 1})]
    assert [profile.made_ahead(prepared, ms) for ms in (11.9, 12, 15.9, 16)] == [0, 1, 1, 2], (
        "a step more than they take"
    )


LINKS = st.builds(LinkProfile, delay_ms=st.floats(0, 500), jitter_ms=st.floats(0, 100))


@given(LINKS, st.lists(st.floats(0, 50), min_size=1, max_size=50), st.text(max_size=5))
def test_jitter_is_bounded_and_keeps_the_order_of_messages(link: LinkProfile, gaps: list[float], seed: str) -> None:
    delays, sent, last = LinkDelays(link, seed), 1000.0, 0.0
    for gap in gaps:
        sent += gap
        arrival = delays.arrival_ms(sent)
        assert arrival >= last, "no message overtakes another"
        assert arrival >= sent + link.delay_ms
        # A message that an earlier one holds up arrives together with it, and that one was sent earlier.
        assert arrival <= sent + link.delay_ms + MOST_JITTER * link.jitter_ms + 1e-9
        last = arrival


def test_jitter_has_its_mean_and_follows_from_its_seed() -> None:
    def drawn(seed: str) -> list[float]:
        delays = LinkDelays(LinkProfile(delay_ms=10, jitter_ms=4), seed)
        return [delays.arrival_ms(1000.0 * i) - 1000.0 * i - 10 for i in range(5000)]

    assert statistics.mean(drawn("a")) == pytest.approx(4, rel=0.05)
    assert drawn("a") == drawn("a")
    assert drawn("a") != drawn("b")


def test_without_jitter_every_message_takes_the_delay() -> None:
    delays = LinkDelays(LinkProfile(delay_ms=7), "s")
    assert [delays.arrival_ms(t) for t in (0.0, 1.0, 1.0)] == [7, 8, 8]


def test_a_profile_is_immutable() -> None:
    profile: HardwareProfile = parse_profile(GOOD, "p")
    with pytest.raises(ValueError, match="frozen"):
        profile.draft.step_ms = 1  # type: ignore[misc]
