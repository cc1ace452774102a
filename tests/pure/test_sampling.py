"""The choice of a token: which one it must be, whatever the batch, the thread count and the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadLogits
from shared.messages import Sampling
from shared.sampling import sampler as sampling
from shared.sampling.noise import gumbel, leading_bits, mixed_vocabulary, noise_key
from shared.sampling.sampler import Columns, choose, choose_in_rows

# Found by search: the token has the largest noise that 31 leading bits allow, and the least.
LARGEST_NOISE = (65569, 100, 7100)
LEAST_NOISE = (24385, 100, 40438)


def by_definition(row: list[float], params: Sampling, position: int) -> int:
    """The choice, written out in plain Python."""
    order = sorted((v for v in range(len(row)) if row[v] > -math.inf), key=lambda v: (-row[v], v))
    if params.temperature == 0:
        return order[0]
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        weights = [math.exp((row[v] - row[order[0]]) / params.temperature) for v in order]
        needed, mass, kept = params.top_p * math.fsum(weights), 0.0, 0
        while kept < len(order) and (mass < needed or kept == 0):
            mass += weights[kept]
            kept += 1
        order = order[:kept]
    return max(
        sorted(order), key=lambda v: (row[v] - row[order[0]]) / params.temperature + gumbel(params.seed, position, v)
    )


def logits_of(seed: int, rows: int, vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


VARIED = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for seed, (temperature, top_k, top_p) in enumerate(
        [
            (0, 0, 1),
            (1, 0, 1),
            (0.7, 0, 1),
            (2.5, 0, 1),
            (1, 40, 1),
            (1, 0, 0.9),
            (0.6, 50, 0.8),
            (100, 0, 1),
            (1e-3, 0, 1),
        ]
    )
]


@settings(max_examples=3 * settings.default.max_examples)
@given(
    numbers=st.lists(st.sampled_from([-math.inf, -30.0, -2.0, -1.0, 0.0, 0.5, 0.5, 1.0, 4.0]), min_size=1, max_size=40),
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 3.0, 100.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1e-9, 0.1, 0.37, 0.5, 0.93, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**20),
)
def test_the_choice_is_the_best_allowed_token_by_definition(
    numbers: list[float], temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> None:
    row = [*numbers, 0.0]
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert choose(torch.tensor([row]), [params], [position]) == [by_definition(row, params, position)]


@settings(max_examples=3 * settings.default.max_examples)
@given(
    numbers=st.lists(
        st.sampled_from([None, None, -math.inf, -30.0, -1.0, 0.0, 0.5, 0.5, 4.0]), min_size=1, max_size=40
    ),
    params=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
        top_k=st.integers(0, 20),
        top_p=st.sampled_from([1e-9, 0.37, 0.93, 1.0]),
        seed=st.integers(-(2**63), 2**63 - 1),
    ),
    position=st.integers(0, 2**20),
)
def test_tokens_without_logits_are_as_if_they_had_minus_infinity(
    numbers: list[float | None], params: Sampling, position: int
) -> None:
    numbers = [*numbers, 0.0]
    ids = [token for token, number in enumerate(numbers) if number is not None]
    whole = torch.tensor([[-math.inf if number is None else number for number in numbers]])
    chosen = choose_in_rows(whole[:, ids].numpy(), [params], [position], Columns.of(np.array(ids)))
    assert chosen == choose(whole, [params], [position])


def test_some_tokens_of_a_large_vocabulary_in_one_batch() -> None:
    logits = logits_of(6, len(VARIED), 49_152)
    ids = torch.randperm(49_152, generator=torch.Generator().manual_seed(0))[:5000].sort().values
    masked = torch.full_like(logits, -math.inf)
    masked[:, ids] = logits[:, ids]
    positions = range(9, 9 + len(VARIED))
    columns = Columns.of(ids.numpy())
    assert choose_in_rows(logits[:, ids].numpy(), VARIED, positions, columns) == choose(masked, VARIED, positions)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 50.0])
def test_the_choice_from_a_large_vocabulary_is_that_of_the_definition(scale: float) -> None:
    logits = logits_of(1, len(VARIED), 20_001, scale)
    expected = [by_definition(row, p, 7 + i) for i, (row, p) in enumerate(zip(logits.tolist(), VARIED, strict=True))]
    assert choose(logits, VARIED, range(7, 7 + len(VARIED))) == expected


@pytest.mark.parametrize("below", [5.0, 15.0, 21.0, 22.9, 23.5, 26.0, 80.0, 1e30])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_the_largest_noise_lifts_a_token_as_far_as_the_definition_says(below: float, temperature: float) -> None:
    seed, position, token = LARGEST_NOISE
    row = torch.full((1, 49_152), -math.inf)
    row[0, token], row[0, 5] = -below * temperature, 0.0
    params = Sampling(temperature=temperature, seed=seed)
    expected = max((5, token), key=lambda v: row[0, v].item() / temperature + gumbel(seed, position, v))
    assert choose(row, [params], [position]) == [expected]
    assert gumbel(*LARGEST_NOISE) > math.log(2**31)


def test_a_leading_token_with_the_least_noise_can_lose() -> None:
    seed, position, token = LEAST_NOISE
    row = torch.full((1, 49_152), -8.0)
    row[0, token] = 0.0
    params = Sampling(temperature=1.0, seed=seed)
    assert choose(row, [params], [position]) == [by_definition(row[0].tolist(), params, position)] != [token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_choice_is_the_same_in_any_batch_and_with_any_threads(dtype: torch.dtype) -> None:
    rows = 4 * len(VARIED)
    logits, params = logits_of(2, rows, 49_152).to(dtype), VARIED * 4
    positions = [1000 + 3 * row for row in range(rows)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [choose(logits[i : i + 1], params[i : i + 1], positions[i : i + 1])[0] for i in range(rows)]
        torch.set_num_threads(2)
        together = choose(logits, params, positions)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = choose(logits[order], [params[i] for i in order], [positions[i] for i in order])
        strided = choose(logits.t().contiguous().t(), params, positions)
    finally:
        torch.set_num_threads(threads)
    assert alone == together == strided
    assert [alone[i] for i in order] == shuffled


def test_the_path_for_accelerators_chooses_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(sampling, "_DEVICE_ELEMENTS", 5 * 49_152)  # several passes
    params = [p.model_copy(update={"seed": seed}) for seed in range(8) for p in VARIED]
    logits = logits_of(3, len(params), 49_152)
    logits[1, :40_000] = -math.inf
    logits[2] = 0.0
    seed, position, token = LARGEST_NOISE
    params[3] = Sampling(temperature=1.0, seed=seed)
    logits[3], logits[3, token], logits[3, 5] = -math.inf, -21.0, 0.0
    positions = [position] * len(params)
    on_device = sampling._choose_on_device(logits.to(device), params, positions)
    assert on_device == choose(logits, params, positions)
    assert on_device[3] == token


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0, 12.0])
def test_accelerators_narrow_rows_down_to_the_tokens_of_the_cpu(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, as bfloat16 makes many, nuclei of any size, and tokens that are not allowed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(sampling, "_DEVICE_ELEMENTS", 40 * 5_000)
    shapes = [
        {"top_k": 1}, {"top_k": 20, "top_p": 0.8}, {"top_k": 400}, {"top_k": 5_000}, {"top_k": 9_000, "top_p": 0.3},
        {"top_p": 0.1}, {"top_p": 0.8}, {"top_p": 0.95}, {"top_p": 0.9999}, {"top_p": 1 - 1e-12}, {"top_p": 1e-9},
    ]  # fmt: skip
    params = [
        Sampling(temperature=temperature, seed=seed, **shape)
        for seed, temperature in enumerate([0.01, 0.6, 0.7, 1.0, 1.9])
        for shape in shapes
    ]
    logits = logits_of(7, len(params), 5_000, scale=scale).bfloat16().float()
    logits[::3, 100:4_000] = -math.inf
    positions = list(range(len(params)))
    assert sampling._choose_on_device(logits.to(device), params, positions) == choose(logits, params, positions)


def test_a_nucleus_whose_end_a_rounding_decides_needs_the_whole_row() -> None:
    logits = np.log(np.array([8.0, 4.0, 2.0, 1.0, 1.0], np.float32))
    total = 2.0
    kept = sampling._allowed_of_likely(logits, Sampling(temperature=1.0, top_p=0.6), total)
    assert kept is not None
    assert kept.tolist() == [0, 1]
    assert sampling._allowed_of_likely(logits, Sampling(temperature=1.0, top_p=0.5), total) is None
    assert sampling._allowed_of_likely(logits, Sampling(temperature=1.0, top_p=0.9), 2 * total) is None


def test_equal_logits_are_chosen_greedily_by_the_lowest_id() -> None:
    row = torch.zeros(1, 49_152)
    row[0, [700, 701, 30_000]] = 2.0
    for params in (Sampling(), Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-12)):
        assert choose(row, [params], [0]) == [700]


def test_low_temperatures_are_greedy_and_high_ones_uniform() -> None:
    logits = logits_of(4, 200, 16, scale=1.0)
    seeds = range(200)
    assert choose(logits, [Sampling(temperature=1e-5, seed=s) for s in seeds], seeds) == logits.argmax(-1).tolist()
    hot = choose(logits[:1].expand(200, -1), [Sampling(temperature=100.0, seed=s) for s in seeds], seeds)
    assert set(hot) == set(range(16))


def test_the_smallest_temperature_that_exists_is_greedy() -> None:
    params = Sampling(temperature=5e-324, top_p=0.5)
    assert choose(torch.tensor([[1.0, 3.0, -math.inf, 2.0]]), [params], [0]) == [1]
    assert choose(torch.tensor([[1.0, 3.0, -math.inf, 2.0]]), [Sampling(temperature=5e-324)], [0]) == [1]


def test_seeds_beyond_the_signed_range_are_their_64_bits() -> None:
    assert gumbel(2**63, 4, 5) == gumbel(-(2**63), 4, 5) != gumbel(0, 4, 5)
    assert gumbel(-1, 4, 5) == gumbel(2**64 - 1, 4, 5) != gumbel(1, 4, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3)])
@pytest.mark.parametrize("find", [choose, sampling._choose_on_device])
def test_logits_that_hold_no_choice_are_refused_with_their_row(bad: float, params: Sampling, find: object) -> None:
    logits = logits_of(5, 3, 100)
    logits[1, 60] = bad
    with pytest.raises(BadLogits, match=r"row 1 \(position 11\).*serve it in float32") as caught:
        find(logits, [params] * 3, [10, 11, 12])  # type: ignore[operator]
    assert caught.value.row == 1


def test_logits_that_are_all_minus_infinity_are_refused() -> None:
    with pytest.raises(BadLogits):
        choose(torch.full((1, 9), -math.inf), [Sampling(temperature=1.0)], [0])


def test_every_row_needs_parameters_and_a_position() -> None:
    with pytest.raises(ValueError, match="one row each"):
        choose(torch.zeros(2, 4), [Sampling()], [0, 1])


def test_no_rows_have_no_choices() -> None:
    assert choose(torch.zeros(0, 4), [], []) == []


def test_the_noise_is_the_same_in_every_process_and_version() -> None:
    # Changing these changes every sampled text that a seed stands for.
    golden = {
        (0, 0, 0): ("0x1.03994e13f4053p+1", 264771122),
        (0, 0, 1): ("0x1.18473bc997181p-11", 1357046230),
        (0, 1, 0): ("0x1.4fefd1e1ef324p-1", 869300634),
        (1, 0, 0): ("0x1.f84915d770765p-1", 669272960),
        (-1, 5, 49151): ("-0x1.ece2b9782427bp-2", 1721747005),
        (2**63 - 1, 8191, 17): ("0x1.8585ab5b1538bp-1", 801671694),
        (2**63, 1, 2): ("0x1.77ca7eab8e27bp-2", 1073391694),
        (123456789, 4095, 31337): ("0x1.3c9f6262fdaeap+1", 173572277),
    }
    for (seed, position, token), (noise, bits) in golden.items():
        # An ulp is left to the C library's logarithm.
        assert gumbel(seed, position, token) == pytest.approx(float.fromhex(noise), rel=1e-14)
        assert leading_bits(noise_key(seed, position), mixed_vocabulary(49_152))[token] == bits


def test_the_noise_screened_with_is_the_leading_part_of_the_exact_noise() -> None:
    bits = leading_bits(noise_key(9, 9), mixed_vocabulary(3000)).astype(np.float64)
    exact = np.array([gumbel(9, 9, token) for token in range(3000)])
    assert np.all(-np.log(-np.log1p(-bits / 2**31)) >= exact)
    assert np.all(-np.log(-np.log1p(-np.minimum((bits + 1) / 2**31, 1 - 2.0**-53))) <= exact)
