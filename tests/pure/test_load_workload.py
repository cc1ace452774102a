"""The load benchmark's requests: reproducible from a seed or a file, and distributed as in the workload."""

from __future__ import annotations

from itertools import islice
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tools.bench.load.core.distributions import Constant, Discrete, Lognormal, Uniform
from services.tools.bench.load.core.requests import NUMBERS_PER_POINT, LoadRequest, first_number, from_lines, to_lines
from services.tools.bench.load.prompts import CHARACTERS_PER_TOKEN, conversation
from services.tools.bench.load.workload import workload_of
from shared.errors import SettingsError

DEFAULT = workload_of("")


def size(request: LoadRequest) -> int:
    return sum(len(message["content"]) for message in request.messages)


def test_a_request_depends_on_seed_session_and_number_only() -> None:
    again = workload_of("")
    backwards = [again.request(i, k) for i in (3, 0) for k in (7, 2)]
    assert [DEFAULT.request(i, k) for i in (3, 0) for k in (7, 2)] == backwards
    assert workload_of("", seed=1).request(3, 7) != DEFAULT.request(3, 7)
    assert len({request.model_dump_json() for request in backwards}) == 4


def test_two_points_share_no_prompt() -> None:
    asked = [(n, r, k) for n in (1, 2, 3, 64) for r in range(3) for k in (0, NUMBERS_PER_POINT - 1)]
    assert len({first_number(n, r) + k for n, r, k in asked}) == len(asked)
    beginnings = {DEFAULT.request(i, first_number(n, 0)).messages[0]["content"][:12] for n in (2, 4) for i in range(50)}
    assert len(beginnings) == 100, "no prefix cache holds them"


def test_requests_follow_the_distributions_of_the_workload() -> None:
    asked = [DEFAULT.request(i, k) for i in range(20) for k in range(50)]
    assert fmean(one.service_class == "interactive" for one in asked) == pytest.approx(0.5, abs=0.06)
    assert fmean(one.temperature == 0.7 for one in asked) == pytest.approx(1 / 3, abs=0.06)
    assert fmean(size(one) > 250 * CHARACTERS_PER_TOKEN for one in asked) == pytest.approx(0.1, abs=0.04)
    assert {one.max_tokens for one in asked} == set(range(32, 97))
    assert all(0 <= one.think_s <= 1 for one in asked)
    promised = {(one.service_class, one.tier, one.slo and one.slo.ttft_ms) for one in asked}
    assert promised == {("interactive", "priority", 2500), ("standard", "default", 5000)}


@given(st.integers(1, 40))
def test_any_number_of_sessions_is_close_to_the_mixture_of_hardware(sessions: int) -> None:
    mixed = workload_of('[[devices]]\nname = "a"\nweight = 3\n[[devices]]\nname = "b"\nweight = 1')
    dealt = [mixed.hardware(i) for i in range(sessions)]
    assert abs(dealt.count("a") - 0.75 * sessions) <= 1
    assert mixed.request(sessions - 1, 5).device == dealt[-1], "a session keeps its hardware"


@given(st.integers(0, 1000), st.floats(20, 900))
def test_a_prompt_has_about_the_wanted_length(seed: int, tokens: float) -> None:
    messages = conversation(seed, tokens, DEFAULT.kinds, held_out=True)
    characters = sum(len(message["content"]) for message in messages)
    assert 0.7 * tokens <= characters / CHARACTERS_PER_TOKEN <= 1.35 * tokens + 20
    assert messages[-1]["role"] == "user"


@given(st.integers(0, 100))
def test_distributions_stay_in_their_bounds(seed: int) -> None:
    rng = Random(seed)
    assert Constant(distribution="constant", value=3).draw(rng) == 3
    assert 1 <= Uniform(distribution="uniform", low=1, high=2).draw(rng) <= 2
    assert 20 <= Lognormal(distribution="lognormal", median=50, sigma=2, low=20, high=150).draw(rng) <= 150
    assert Discrete(distribution="choice", values=[1, 5]).draw(rng) in (1, 5)


@pytest.mark.parametrize(("process", "burstiness", "variation"), [("poisson", 9, 1.0), ("gamma", 4, 2.0)])
def test_open_arrivals_have_their_rate_and_burstiness(process: str, burstiness: float, variation: float) -> None:
    workload = workload_of(f'[arrivals]\nprocess = "{process}"\nrate = 0.5\nburstiness = {burstiness}')
    arrivals = list(islice(workload.arrivals_s(4, 100), 8000))
    times = [at_s for at_s, _, _ in arrivals]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert fmean(gaps) == pytest.approx(1 / (0.5 * 4), rel=0.1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.15)
    assert [(session, number) for _, session, number in arrivals[:5]] == [
        (0, 100),
        (1, 100),
        (2, 100),
        (3, 100),
        (0, 101),
    ]
    assert list(islice(workload.arrivals_s(4, 100), 9)) == arrivals[:9]


def test_a_written_file_gives_the_same_requests() -> None:
    asked = [DEFAULT.request(i, first_number(2, 0) + k) for k in range(3) for i in range(2)]
    read = from_lines(to_lines(asked))
    assert [read.request(one.session, one.number) for one in asked] == asked
    beyond = read.request(1, first_number(2, 0) + 3)
    assert beyond == asked[1].model_copy(update={"number": beyond.number}), "after its end, a list repeats"
    other = read.request(5, 0)
    assert (other.session, other.messages) == (5, asked[1].messages), "an unknown session takes the list of another one"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed = ", "not TOML"),
        ("sed = 1", "sed: Extra inputs"),
        ('kinds = ["poem"]', "no kinds of text: poem; there are business"),
        ("[[think_s]]\ndistribution = 'uniform'\nlow = 2\nhigh = 1", "low is 2, above high"),
        ("[[think_s]]\ndistribution = 'pareto'", "think_s"),
        ('[[classes]]\nname = "a"\nttft_ms = 5', "both ttft_ms and tpot_ms"),
        ('[[devices]]\nname = "a"\n[[devices]]\nname = "a"', "each device needs a name of its own"),
    ],
)
def test_a_bad_workload_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        workload_of(text)


@pytest.mark.parametrize(("text", "problem"), [("", "is empty"), ('{"session": 0}', "line 1 of the requests: number")])
def test_a_bad_file_of_requests_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        from_lines(text)
