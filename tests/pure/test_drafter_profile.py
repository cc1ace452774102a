"""Device profiles: what a file may say, the times that follow from it, and how messages travel."""

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


def test_a_file_gives_its_figures() -> None:
    profile = parse_profile(GOOD, "p")
    assert (profile.draft.step_ms, profile.draft.prompt_ms) == (4, 0.5)
    assert (profile.uplink, profile.downlink) == (LinkProfile(delay_ms=10, jitter_ms=3), LinkProfile(delay_ms=5))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("step_ms = 4\n", "", "draft.step_ms: missing"),
        ("[downlink]\ndelay_ms = 5", "", "downlink: missing"),
        ("step_ms = 4", "step_ms = -4", "draft.step_ms: Input should be greater than or equal to 0"),
        ("jitter_ms = 3", "jitter_ms = -1", "uplink.jitter_ms: Input should be greater than or equal to 0"),
        ("delay_ms = 10", "delay_ms = nan", "uplink.delay_ms: Input should be a finite number"),
        ("delay_ms = 10", "delay_ms = inf", "uplink.delay_ms: Input should be a finite number"),
        ("delay_ms = 10", 'delay_ms = "far"', "uplink.delay_ms: Input should be a valid number"),
        ("prompt_ms", "promt_ms", "draft.promt_ms: no such key"),
        ("[uplink]", "[uplink", "p is not TOML"),
    ],
)
def test_a_bad_file_is_refused_in_plain_words(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError) as refused:
        parse_profile(GOOD.replace(old, new, 1), "p")
    assert said in str(refused.value)


def test_profiles_are_found_by_name_or_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    assert load_profile("") is None
    assert load_profile(str(tmp_path / "mine.toml")) == parse_profile(GOOD, "mine")
    with pytest.raises(SettingsError, match=r"no device profile toaster .*raspberry-pi-5.*WISP_DEVICE_PROFILE"):
        load_profile("toaster")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="no device profile"):
        load_profile(str(tmp_path / "binary"))


@pytest.mark.parametrize("name", ["raspberry-pi-5", "jetson-orin-nano", "laptop", "phone"])
def test_shipped_profiles_are_sound_and_say_where_their_figures_come_from(name: str) -> None:
    profile = load_profile(name)
    assert profile is not None
    assert profile.description
    assert 0 < profile.draft.prompt_ms < profile.draft.step_ms
    lines = (SHIPPED / f"{name}.toml").read_text().splitlines()
    for figure in ("step_ms", "prompt_ms", "[uplink]"):
        (place,) = (i for i, line in enumerate(lines) if line.startswith(figure))
        assert lines[place - 1].startswith("# ")


def test_a_draft_takes_its_steps_and_what_had_to_be_computed_before_it() -> None:
    profile = parse_profile(GOOD, "p")
    assert profile.draft_ms(Draft([5, 6], {"hidden": 3}, computed=1)) == 12
    assert profile.draft_ms(Draft([5], {"hidden": 1}, computed=101)) == 4 + 50
    assert profile.draft_ms(Draft([5, 6, 7])) == 0, "copied tokens cost nothing"
    assert profile.ahead_ms(Draft([5], {"hidden": 2})) == 12


LINKS = st.builds(LinkProfile, delay_ms=st.floats(0, 500), jitter_ms=st.floats(0, 100))


@given(LINKS, st.lists(st.floats(0, 50), min_size=1, max_size=50), st.text(max_size=5))
def test_jitter_is_bounded_and_keeps_the_order_of_messages(link: LinkProfile, gaps: list[float], seed: str) -> None:
    travel, sent, last = LinkDelays(link, seed), 1000.0, 0.0
    for gap in gaps:
        sent += gap
        arrival = travel.arrival_ms(sent)
        assert arrival >= last, "no overtaking"
        assert arrival >= sent + link.delay_ms
        # One held up by an earlier one arrives with it, and that one was sent earlier.
        assert arrival <= sent + link.delay_ms + MOST_JITTER * link.jitter_ms + 1e-9
        last = arrival


def test_jitter_has_its_mean_and_comes_again_with_its_seed() -> None:
    def drawn(seed: str) -> list[float]:
        travel = LinkDelays(LinkProfile(delay_ms=10, jitter_ms=4), seed)
        return [travel.arrival_ms(1000.0 * i) - 1000.0 * i - 10 for i in range(5000)]

    assert statistics.mean(drawn("a")) == pytest.approx(4, rel=0.05)
    assert drawn("a") == drawn("a")
    assert drawn("a") != drawn("b")


def test_without_jitter_every_message_takes_the_delay() -> None:
    travel = LinkDelays(LinkProfile(delay_ms=7), "s")
    assert [travel.arrival_ms(t) for t in (0.0, 1.0, 1.0)] == [7, 8, 8]


def test_a_profile_cannot_be_changed() -> None:
    profile: HardwareProfile = parse_profile(GOOD, "p")
    with pytest.raises(ValueError, match="frozen"):
        profile.draft.step_ms = 1  # type: ignore[misc]
