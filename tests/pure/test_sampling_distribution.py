"""Draws follow the target's distribution and are independent. Seeds are fixed, so that results never change.

Most draws are made by the definition, for many positions at once, and `choose` must make the same choice at hundreds of
them: it takes a hundred times as long, and one other choice weighs more than any statistic.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from shared.messages import Sampling
from shared.sampling.noise import gumbel, hashed_bits, leading_bits, mixed_vocabulary, noise_key
from shared.sampling.sampler import choose

DRAWS = 20_000
"""Enough for a temperature that is 5 % off to fail at a p-value of 1e-18."""
CHOSEN = 500
"""Draws of each case that `choose` makes too: enough to notice, 99 times of 100, that it errs in one draw of 100."""
SIGNIFICANCE = 1e-4


def softmax(logits: torch.Tensor, params: Sampling) -> np.ndarray:
    """The distribution that `params` ask for, by transformers' order: temperature, top_k, top_p."""
    row = logits.double().numpy() / params.temperature
    order = np.argsort(-row, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(row[order] - row[order[0]])
    weights /= weights.sum()
    kept = int(np.searchsorted(np.cumsum(weights), params.top_p)) + 1
    probabilities = np.zeros(len(row))
    probabilities[order[:kept]] = weights[:kept]
    return probabilities / probabilities.sum()


def drawn(logits: torch.Tensor, params: Sampling, seeds: range, positions: range) -> np.ndarray:
    """Draw a token for each seed and position, position after position for each seed."""
    with np.errstate(divide="ignore"):
        scores = np.log(softmax(logits, params))
    each_seed = np.repeat([seed % 2**64 for seed in seeds], len(positions)).astype(np.uint64)
    each_position = np.tile(positions, len(seeds)).astype(np.uint64)
    tokens = (scores + noise_of(each_seed, each_position, len(logits))).argmax(axis=1)
    some = np.linspace(0, len(tokens) - 1, CHOSEN, dtype=int).tolist()
    with_seed = [params.model_copy(update={"seed": seeds[index // len(positions)]}) for index in some]
    chosen = choose(logits.expand(CHOSEN, -1), with_seed, [positions[index % len(positions)] for index in some])
    assert chosen == tokens[some].tolist()
    return tokens


def noise_of(seeds: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """The noise of all tokens for each seed and position: `gumbel`, whose integers can be arrays as well."""
    keys = noise_key(seeds, positions)[:, None]
    bits = hashed_bits(keys, np.arange(size, dtype=np.uint64))
    return -np.log(-np.log1p(-np.minimum((bits + 0.5) * 2.0**-63, 1 - 2.0**-53)))


def fits(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the chi-square test; cells that expect fewer than 5 draws count as one."""
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    expected = probabilities * len(tokens)
    assert not observed[probabilities == 0].any(), "a token outside the allowed set was drawn"
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(11)) * 2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (12, 0.9)])
def test_draws_over_many_seeds_follow_the_allowed_part_of_the_softmax(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    assert fits(drawn(logits, params, range(DRAWS), range(77, 78)), softmax(logits, params)) > SIGNIFICANCE


@pytest.mark.parametrize("seed", [0, -5, 2**62])
def test_draws_over_the_positions_of_one_session_follow_the_softmax(logits: torch.Tensor, seed: int) -> None:
    params = Sampling(temperature=1.0)
    tokens = drawn(logits, params, range(seed, seed + 1), range(DRAWS))
    assert fits(tokens, softmax(logits, params)) > SIGNIFICANCE


def test_the_test_itself_tells_a_wrong_temperature(logits: torch.Tensor) -> None:
    tokens = drawn(logits, Sampling(temperature=1.05), range(DRAWS), range(1))
    assert fits(tokens, softmax(logits, Sampling(temperature=1.0))) < SIGNIFICANCE


def test_the_noise_of_many_draws_is_that_of_the_definition() -> None:
    seeds, positions = [0, 5, 2**62, 2**64 - 5], [3, 0, 2**20, 77]
    expected = [[gumbel(s, p, token) for token in range(48)] for s, p in zip(seeds, positions, strict=True)]
    np.testing.assert_allclose(
        noise_of(np.array(seeds, np.uint64), np.array(positions, np.uint64), 48), expected, 1e-12
    )


def test_a_large_vocabulary_is_drawn_from_evenly_across_its_ids() -> None:
    params = [Sampling(temperature=1.0, seed=seed) for seed in range(40) for _ in range(100)]
    tokens = np.array(choose(torch.zeros(1, 49_152).expand(4000, -1), params, [*range(100)] * 40))
    assert fits(tokens // 1024, np.full(48, 1 / 48)) > SIGNIFICANCE
    assert fits(tokens % 64, np.full(64, 1 / 64)) > SIGNIFICANCE


@pytest.fixture(scope="module")
def choices() -> np.ndarray:
    """The choices of 201 neighbouring seeds among 8 tokens, by seed and position."""
    tokens = drawn(torch.linspace(0, 1.5, 8), Sampling(temperature=1.0), range(201), range(116))
    return tokens.reshape(201, 116)


@pytest.mark.parametrize("apart", [1, 2, 16])
def test_choices_at_two_positions_are_independent(choices: np.ndarray, apart: int) -> None:
    assert independent(choices[:, :-apart].ravel(), choices[:, apart:].ravel())


def test_choices_at_distant_positions_are_independent(choices: np.ndarray) -> None:
    distant = drawn(torch.linspace(0, 1.5, 8), Sampling(temperature=1.0), range(100), range(1024, 1124))
    assert independent(choices[:100, :100].ravel(), distant)


def test_choices_of_neighbouring_seeds_are_independent(choices: np.ndarray) -> None:
    assert independent(choices[:-1].ravel(), choices[1:].ravel())


def independent(one: np.ndarray, other: np.ndarray) -> bool:
    table = np.zeros((8, 8))
    np.add.at(table, (one, other), 1)
    return float(stats.chi2_contingency(table).pvalue) > SIGNIFICANCE


@pytest.mark.parametrize("step", [1, 2, 7, 256, 4096])
def test_the_noise_of_two_tokens_or_positions_is_uncorrelated(step: int) -> None:
    mixed = mixed_vocabulary(16_384)
    noise = np.stack([leading_bits(noise_key(3, position), mixed) for position in range(256)]) / 2**31
    deviates = (noise - 0.5) * np.sqrt(12)
    assert abs(noise.mean() - 0.5) < 5 * np.sqrt(1 / 12 / noise.size)
    across_tokens = (deviates[:, :-step] * deviates[:, step:]).mean()
    assert abs(across_tokens) < 5 / np.sqrt(deviates[:, step:].size)
    if step < 256:
        across_positions = (deviates[:-step] * deviates[step:]).mean()
        assert abs(across_positions) < 5 / np.sqrt(deviates[step:].size)


def test_every_bit_of_the_noise_is_even() -> None:
    mixed = mixed_vocabulary(49_152)
    words = np.stack([leading_bits(noise_key(seed, seed), mixed) for seed in range(40)])
    for bit in range(31):
        share = ((words >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(words.size)


def test_similar_distributions_with_the_same_noise_mostly_choose_alike() -> None:
    generator = torch.Generator().manual_seed(8)
    target = torch.randn(2000, 1000, generator=generator) * 3
    draft = target + 0.3 * torch.randn(2000, 1000, generator=generator)
    same_seed = [Sampling(temperature=1.0, seed=4)] * 2000
    choices = np.array(choose(target, same_seed, range(2000)))
    shared = (np.array(choose(draft, same_seed, range(2000))) == choices).mean()
    other_seed = [Sampling(temperature=1.0, seed=5)] * 2000
    independently = (np.array(choose(draft, other_seed, range(2000))) == choices).mean()
    assert shared > 0.7
    assert independently < 0.5 * shared
